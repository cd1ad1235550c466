"""What a sweep does with a ladder of models, its tasks and its seeds, as a graph of runs.

Sources: Burns et al. 2023 (section 3: weak, ceiling, student; 4.3: bootstrapping; 5.2: prompting); EleutherAI/w2s and its blog post
(strong-to-strong, probes, filters, relabelling). Every filter comes with a random filter of the same size.
"""

from __future__ import annotations

from w2s_jax import config as config_lib
from w2s_jax import registry
from w2s_jax.graph import Graph, check, short, variant

GROUND_TRUTH_LOSS = "xent"
# What the stages probe and prompt have in common with the finetune runs beside them: the documents, and how is computed.
SHARED = ("data_seed", "revision", "dtype", "param_dtype", "matmul_precision", "attention", "task", "task_dir", "task_revision", "n_train",
          "n_val", "n_test", "test_fraction", "group", "balance", "eval_batch_size", "mesh")  # fmt: skip


def build(config, root, identify) -> Graph:
    """The graph of a sweep.

    Args:
      config: as `configs/sweep.py` gives it.
      root, identify: see `graph.Graph`.

    Raises:
      UserError: a ladder, learning rates or pairs that do not fit together.
    """
    check(config)
    graph = Graph(root, identify)
    rungs = _ladder(config, graph)
    for task in config.tasks:
        _Task(config, graph, rungs, task).add()
    return graph


def _ladder(config, graph: Graph) -> list[tuple[str, str, tuple[str, ...]]]:
    """`(name, model folder or id, parents)` of each rung, weakest first: one ladder for all seeds, as published checkpoints are."""
    if not config.rungs:
        return [(short(m), m, ()) for m in config.models]
    out = []
    for rung in config.rungs:
        made = config_lib.shipped("pretrain", rung)
        node = graph.add("pretrain", f"{rung}-s{config.pretrain.seed}", variant(config.pretrain, arch=made.arch))
        out.append((rung, f"{graph.path(node)}/model", (node,)))
    return out


class _Task:
    """The runs of one task. Rungs are numbered from the weakest, 0; `w` and `s` are a supervisor's and a student's."""

    def __init__(self, config, graph: Graph, rungs, task: str):
        self.config, self.graph, self.task, self.rungs = config, graph, task, rungs
        self.names = [name for name, _, _ in rungs]
        self.pairs = [(w, s) for s in range(len(rungs)) for w in range(s) if config.pairs == "all" or w == s - 1]
        rates = config.learning_rates or (config.base.learning_rate,) * len(rungs)
        self.base = {(rung, seed): registry.fill(variant(config.base, seed=seed, task=task, model=path, learning_rate=rate))
                     for rung, ((_, path, _), rate) in enumerate(zip(rungs, rates)) for seed in config.seeds}
        self.weak: dict[tuple, str] = {}
        self.ceiling: dict[tuple, str] = {}
        self.labelled: dict[tuple, str] = {}

    def add(self) -> None:
        """Ground truth and labels of every seed first: an ensemble needs those of all seeds."""
        weak, strong = (sorted(set(side)) for side in zip(*self.pairs))
        for seed in self.config.seeds:
            for w in weak:
                self.weak[w, seed] = self._finetune(w, seed, f"{self.names[w]}-{GROUND_TRUTH_LOSS}_a", GROUND_TRUTH_LOSS, split="a")
                self.labelled[w, seed] = self._label(self.weak[w, seed], self.names[w], seed)
            for s in strong:
                self.ceiling[s, seed] = self._finetune(s, seed, f"{self.names[s]}-{GROUND_TRUTH_LOSS}_b", GROUND_TRUTH_LOSS, split="b")
        for seed in self.config.seeds:
            for w, s in self.pairs:
                self._students(w, s, seed)
            for s in strong:
                self._ensembles(s, [w for w, strong in self.pairs if strong == s], seed)

    # ---------------------------------------------------------------- runs

    def _add(self, name: str, seed: int, run_config, parents) -> str:
        return self.graph.add(short(self.task), f"{name}-s{seed}", run_config, parents)

    def _finetune(self, rung: int, seed: int, name: str, loss: str, parents=(), **keys) -> str:
        return self._add(name, seed, variant(self.base[rung, seed], loss=loss, **{"labels": ""} | keys), (*parents, *self.rungs[rung][2]))

    def _label(self, run: str, name: str, seed: int) -> str:
        return self._add(name, seed, variant(config_lib.shipped("label"), run=self.graph.path(run), split="b"), (run,))

    def _student(self, w_name: str, s: int, seed: int, loss: str, labels: str, kind: str = "", file: str = "", **keys) -> str:
        """A student of the labels that the run `labels` made (in its `file`, where it is not half B's own)."""
        name = f"{w_name}_to_{self.names[s]}-{loss}{kind}"
        path = self.graph.path(labels) + (f"/predictions/{file}" if file else "")
        return self._finetune(s, seed, name, loss, (labels,), split="b", labels=path, **keys)

    def _frozen(self, stage: str, s: int, seed: int, name: str, parents, **keys) -> str:
        """A run of the stage probe or prompt: the strong model as it was pretrained."""
        template, base = self.config[stage], self.base[s, seed]
        shared = {key: base[key] for key in SHARED if key in template}
        config = variant(template, **shared | {"model": self.rungs[s][1], "seed": seed} | keys)
        return self._add(name, seed, config, (*parents, *self.rungs[s][2]))

    def _probe(self, w: int, s: int, seed: int, probe: str, mode: str) -> str:
        arguments = self.config.probe.probe_args
        own = {key: value for key, value in arguments.items() if key in config_lib.PROBE_ARGS[probe]}
        labels = self.labelled[w, seed]
        return self._frozen(
            "probe", s, seed, f"{self.names[w]}_to_{self.names[s]}-{mode}_{probe}", (labels,), mode=mode, probe=probe, split="b",
            labels=self.graph.path(labels), features=f"{self.graph.root}/features",
            max_length=self.base[s, seed].max_length, overlong=self.base[s, seed].overlong,
            probe_args={key: own.get(key) for key in arguments})

    # ---------------------------------------------------------------- what a student is made by

    def _pair(self, weak: str, s: int, seed: int, method: str, student: str, supervisor: str, labels: str, control: str = "") -> None:
        """A row of the report: `weak` names the supervisor, `student` was trained on `labels`."""
        runs = {"weak": supervisor, "label": labels, "ceiling": self.ceiling[s, seed], "student": student}
        pair = {"task": short(self.task), "weak": weak, "strong": self.names[s], "method": method, "seed": seed, "runs": runs}
        if control:
            pair["control"] = control
        if self.config.base.select == "oracle" and self.graph.nodes[student].stage == "finetune":
            pair["oracle"] = True
        self.graph.pairs.append(pair)

    def _students(self, w: int, s: int, seed: int) -> None:
        config, weak, labels, name = self.config, self.weak[w, seed], self.labelled[w, seed], self.names[w]

        def row(method, student, labels=labels, control=""):
            self._pair(name, s, seed, method, student, weak, labels, control)

        for loss in config.losses:
            student = self._student(name, s, seed, loss, labels)
            row(loss, student)
            self._rounds(name, s, seed, loss, student, labels, row)
            if config.bootstrap and s - w > 1:
                chain = labels
                for m in range(w + 1, s):
                    between = self._student(self.names[m - 1], m, seed, loss, chain, "_bootstrap" if m - 1 > w else "")
                    chain = self._label(between, f"{name}_to_{self.names[m]}-{loss}", seed)
                row(f"{loss} bootstrap", self._student(self.names[s - 1], s, seed, loss, chain, "_bootstrap"), chain)
        for probe in config.probes:
            row(f"probe {probe}", self._probe(w, s, seed, probe, "predict"))
        first = config.losses[0]
        for probe in config.filters:
            kept = self._probe(w, s, seed, probe, "filter")
            method, control = f"{first} filter {probe}", f"{first} filter {probe} random"
            row(method, self._student(name, s, seed, first, kept, f"_filter_{probe}"), kept, control)
            row(control, self._student(name, s, seed, first, kept, f"_filter_{probe}_random", "b_random.parquet"), kept)
        for probe in config.relabels:
            made = self._probe(w, s, seed, probe, "relabel")
            row(f"{first} relabel {probe}", self._student(name, s, seed, first, made, f"_relabel_{probe}"), made)
        for floor in config.floors:
            shots = config.shots if floor == "few_shot" else 0
            asked = config.seeds[0] if not shots else seed  # without shots nothing is drawn: one run serves all seeds
            prompted = self._frozen("prompt", s, asked, f"{self.names[s]}-{floor}", (), shots=shots)
            row(floor.replace("_", "-"), prompted)

    def _rounds(self, name: str, s: int, seed: int, loss: str, student: str, first: str, row) -> None:
        """Strong-to-strong: a fresh copy of the student learns the last student's labels, round after round. A loss that takes a
        statistic of its labels (window's midweak) keeps the first round's, as in EleutherAI/w2s."""
        for number in range(1, self.config.s2s_rounds + 1):
            labels = self._label(student, f"{name}_to_{self.names[s]}-{loss}" + (f"_s2s{number - 1}" if number > 1 else ""), seed)
            keys = {"stats_labels": self.graph.path(first)} if self.base[s, seed].loss_args.radius == "midweak" and loss == "window" else {}
            student = self._student(name, s, seed, loss, labels, f"_s2s{number}", **keys)
            row(f"{loss} s2s {number}", student, labels)

    def _ensembles(self, s: int, weaker: list[int], seed: int) -> None:
        """Students of several supervisors at once: of one model's seeds, or of all weaker models."""
        config = self.config
        if config.members == "seeds":
            groups = {f"{self.names[w]} x{len(config.seeds)}": [(w, other) for other in config.seeds] for w in weaker}
        else:
            groups = {"+".join(self.names[w] for w in weaker): [(w, seed) for w in weaker]} if len(weaker) > 1 else {}
        for name, members in groups.items():
            labelled = [self.labelled[member] for member in members]
            for how in config.ensembles:
                made = variant(config_lib.shipped("ensemble"), runs=tuple(map(self.graph.path, labelled)), how=how)
                file = short(name.replace("+", "_"))
                run = self._add(f"{file}-{how}", members[0][1], made, labelled)
                for loss in config.losses:
                    student = self._student(f"{file}_{how}", s, seed, loss, run)
                    self._pair(f"{name} {how}", s, seed, loss, student, run, run)
