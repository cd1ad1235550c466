"""How large a sweep's runs are and how long they take, from their configs and models: disk, work, memory of a device."""

from __future__ import annotations

from w2s_jax import hub, memory, models, optimizers, registry, workload
from w2s_jax.data import packing
from w2s_jax.graph import Graph, Node
from w2s_jax.ladder import ROOM


def disk(graph: Graph) -> float:
    """Bytes that the checkpoints of a sweep's runs will hold, from the sizes of their models."""
    total = 0.0
    for node in graph.nodes.values():
        if node.stage == "pretrain":
            total += _size(graph, node)
        elif node.stage == "finetune" and node.config.keep != "none" and node.config.train == "full":
            total += _size(graph, node) * (3 if node.config.keep == "all" else 1)
    return total


def _size(graph: Graph, node: Node) -> float:
    """Bytes of a run's model: one that the sweep pretrains, or one that is there."""
    if node.stage == "pretrain":
        return workload.arch_bytes(node.config)
    if node.stage in ("label", "ensemble"):
        return _size(graph, graph.nodes[node.parents[0]])
    made = next((p for p in node.parents if f"{graph.path(p)}/model" == node.config.model), None)
    return _size(graph, graph.nodes[made]) if made else workload.model_bytes(node.config.model, node.config.revision)


def work(graph: Graph, node: Node) -> float:
    """How long a run takes compared with the others, roughly: bytes of the model times places for tokens, three for each trained on."""
    if node.stage == "ensemble":
        return 0.0
    if node.stage == "label":
        trained = graph.nodes[node.parents[0]].config
        places = trained.max_length * trained.n_train / 2
    elif node.stage == "probe":  # the first of a model's; the others find its features
        places = node.config.max_length * (node.config.n_train / 2 + node.config.n_test)
    elif node.stage == "prompt":
        places = node.config.max_length / 8 * node.config.n_test * (2 + node.config.shots)
    elif node.stage == "pretrain":
        places = 3 * node.config.max_length * node.config.steps * node.config.batch_size
    else:
        places = node.config.max_length * (3 * node.config.epochs * node.config.n_train / 2 + node.config.n_test)
    return places * _size(graph, node)


class Fits:
    """Whether a run that leaves its mesh open fits one device, with the smallest microbatch and full rematerialisation.

    Args:
      limit: bytes of a device; 0 = not known, then every run is taken to fit.
    """

    def __init__(self, graph: Graph, limit: int):
        self.graph, self.limit = graph, limit
        self._made = {f"{graph.path(name)}/model" for name in graph.nodes}
        self._known: dict[tuple, int] = {}

    def __call__(self, node: Node) -> bool:
        config = registry.fill(self.graph.nodes[node.parents[0]].config if node.stage == "label" else node.config)
        if not self.limit or not config.model or config.model in self._made:  # what a sweep pretrains is small
            return True
        trains = node.stage == "finetune"
        key = (trains, *(str(config.get(name)) for name in ("model", "revision", "dtype", "param_dtype", "train", "lora", "max_length",
                                                            "optimizer", "optimizer_args", "batch_size", "offload")))
        if key not in self._known:
            self._known[key] = _memory(config, trains)
        return self._known[key] <= ROOM * self.limit


def _memory(config, trains: bool) -> int:
    """Bytes that a training step of one document at a time, or a forward pass of one, takes on one device."""
    folder = hub.resolve(config.model, config.revision)
    model = models.build(models.read_config(folder), head="classifier", dtype=config.dtype, remat="full",
                         param_dtype=workload.param_dtype(config, folder), lora=workload.lora(config))
    how: dict = {}
    if trains:
        how = {"optimizer": optimizers.of(config), "train": config.train, "microbatches": config.batch_size}
    shape = packing.Shape(1, min(config.max_length, model.config.max_positions))
    # Of two documents a row: what serves one alone depends on the device, which is not to be asked here.
    return memory.estimate(model, {"data": 1, "fsdp": 1, "model": 1}, shape, slots=2, remat="full",
                           offload=config.get("offload", "none"), platform="gpu", **how).peak
