"""Vision models: a published checkpoint -> `VisionConfig` -> `VisionModel`, whose parameters are a plain nested dict of arrays.

    config = read_config(path)                     # a folder in Hugging Face's format, or a .pth file
    model = build(config, head="own")
    params = load(path, model)                     # or model.init(key)
    logits = model.apply(params, batch)            # [cells, slots, classes], float32
    features = model.features(params, batch)       # [cells, slots, embed], float32

A batch is a dict: `images`, uint8 (or float32 of 0 to 255) [cells, slots, height, width, 3], RGB, resized and cropped already, and
`documents`, int32 [cells, slots], the image's index in the batch (-1 = empty slot). Models carry no sharding.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from w2s_jax.errors import UserError, nearest
from w2s_jax.models import heads, weights
from w2s_jax.models.backbone import REMAT
from w2s_jax.models.layers import Compute, Linear
from w2s_jax.models.vision import names as names_lib
from w2s_jax.models.vision import writing
from w2s_jax.models.vision.config import AlexNet, ResNet, VisionConfig, ViT
from w2s_jax.models.vision.convolutional import TORCH, AlexNetBackbone, ResNetBackbone
from w2s_jax.models.vision.reading import MODEL_TYPES, new_vit, open_checkpoint, read_config
from w2s_jax.models.vision.transformer import ViTBackbone
from w2s_jax.models.weights import paths

__all__ = ["HEAD_INITS", "HEADS", "MODEL_TYPES", "VisionConfig", "VisionModel", "build", "check_save", "load", "new_vit", "read_config",
           "save", "stored_dtype"]

HEADS = ("own", "new", "none")  # the checkpoint's classifier | one linear layer on the features | features only
HEAD_INITS = tuple(name for name in heads.HEAD_INITS if name != "unembedding")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BACKBONES = {AlexNet: AlexNetBackbone, ResNet: ResNetBackbone, ViT: ViTBackbone}


class _Published(nnx.Module):
    """A published classifier: AlexNet's two hidden layers (its dropout is for training alone), and a linear layer with a bias."""

    def __init__(self, config: VisionConfig, compute: Compute, *, rngs: nnx.Rngs):
        arch, width = config.architecture, config.embed
        transformer = isinstance(arch, ViT)
        self.dense1 = self.dense2 = nnx.data(None)
        if isinstance(arch, AlexNet):
            self.dense1 = self._dense(width, arch.dense[0], compute, rngs)
            self.dense2 = self._dense(*arch.dense, compute, rngs)
            width = arch.dense[1]
        width = 2 * width if transformer and arch.wide else width
        last = heads.Classifier(width, config.classes, "normal", bias=True, rngs=rngs)
        if not transformer:
            self._like_torch(last, rngs)
        self.kernel, self.bias = last.kernel, last.bias

    def _dense(self, inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs) -> Linear:
        return self._like_torch(Linear(inputs, outputs, 0.0, compute, rngs=rngs), rngs)

    @staticmethod
    def _like_torch(layer, rngs: nnx.Rngs):
        """The layer with torch.nn.Linear's initialisation: uniform within fan_in**-0.5."""
        inputs, outputs = layer.kernel[...].shape
        layer.kernel = nnx.Param(TORCH(rngs.params(), (inputs, outputs), layer.kernel[...].dtype))
        layer.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), layer.bias[...].dtype, -(inputs**-0.5), inputs**-0.5))
        return layer

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.dense1 is not None:
            x = jax.nn.relu(self.dense2(jax.nn.relu(self.dense1(x))))
        return jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision="highest") + self.bias[...]


class _Network(nnx.Module):
    """The module whose state the params are."""

    def __init__(self, config: VisionConfig, compute: Compute, head: str, classes: int, head_init: str, key: jax.Array):
        rngs = [nnx.Rngs(params=jax.random.fold_in(key, i)) for i in range(2)]
        self.backbone = BACKBONES[type(config.architecture)](config.architecture, compute, rngs=rngs[0])
        if head == "own":
            self.head = _Published(config, compute, rngs=rngs[1])
        elif head == "new":
            self.head = heads.Classifier(config.embed, classes, head_init, bias=True, rngs=rngs[1])


class VisionModel:
    """A backbone and a head as pure functions of params; made by `build`, which gives equal arguments the same object.

    `config`: the VisionConfig. `head`: one of HEADS. `classes`: outputs an image (0 with head "none"). `param_dtype`: numpy dtype of
    the backbone's parameters. `abstract`: nested dict of jax.ShapeDtypeStruct with the structure of params.
    """

    def __init__(self, config: VisionConfig, head: str, classes: int, compute: Compute, head_init: str):
        self.config, self.head, self.classes = config, head, classes
        self.compute, self.param_dtype = compute, compute.param_dtype
        self._make = lambda key: _Network(config, compute, head, classes, head_init, key)
        # One function for the model's life, so that each run after the first finds it compiled; the rest of init is dead code.
        self._init_new = jax.jit(lambda key: {k: v for k, v in self.init(key).items() if k == "head" and head == "new"})
        self._graph, state = nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))
        self.abstract = nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> dict:
        """Random params by the published initialisation, a new head by head_init; works under jit with out_shardings."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def init_new(self, key: jax.Array) -> dict:
        """Only the part of `init(key)` that no checkpoint holds: {"head": ...}, or {} where the head is the checkpoint's or none."""
        return self._init_new(key)

    def _merge(self, params: dict) -> _Network:
        if jax.tree.structure(params) != jax.tree.structure(self.abstract):
            raise ValueError(f"params have other keys than the model: {sorted(set(paths(params)) ^ set(paths(self.abstract)))}")
        return nnx.merge(self._graph, params)

    def _read(self, network: _Network, batch: dict, dropout_key=None, **options) -> jax.Array:
        """What the backbone gives for each image, float32 [cells * slots, embed]."""
        images = batch["images"]
        x = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 255
        x = (x - jnp.asarray(self.config.mean, jnp.float32)) / jnp.asarray(self.config.std, jnp.float32)
        keys = None if dropout_key is None or not self.compute.dropout else (dropout_key, batch["documents"].reshape(-1))
        return network.backbone(x, keys, **options)

    def apply(self, params: dict, batch: dict, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits, float32 [cells, slots, classes]; those of empty slots have no meaning.

        Dropout (transformers only, where their authors have it) is on only with `dropout_key` (one per step) and a rate above 0.
        """
        if self.head == "none":
            raise ValueError("this model was built without a head: it has features only")
        network = self._merge(params)
        wide = self.head == "own" and isinstance(self.config.architecture, ViT) and self.config.architecture.wide
        x = self._read(network, batch, dropout_key, **({"wide": True} if wide else {}))
        return network.head(x).reshape(*batch["images"].shape[:2], -1)

    def features(self, params: dict, batch: dict) -> jax.Array:
        """What a probe reads, float32 [cells, slots, embed]: AlexNet's last convolutional features, flattened channel by channel;
        a ResNet's mean over places; a transformer's class token after the final norm."""
        return self._read(self._merge(params), batch).reshape(*batch["images"].shape[:2], -1)


@cache
def build(config: VisionConfig, *, head: str, classes: int = 2, dtype: str = "float32", param_dtype: str = "float32",
          remat: str = "none", head_init: str = "zeros", dropout: float = 0.0) -> VisionModel:
    """The VisionModel for these arguments; equal arguments give the identical object. `classes` counts for a new head only.

    Raises:
      UserError: an argument that is not known, or that does not fit the model.
    """
    choices = {"head": (head, HEADS), "dtype": (dtype, DTYPES), "param_dtype": (param_dtype, DTYPES), "remat": (remat, REMAT),
               "head_init": (head_init, HEAD_INITS)}
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{key}={value!r} is not known{nearest(value, known)}; expected one of {', '.join(known)}")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout={dropout!r}: expected a rate from 0 to below 1")
    if dropout and not isinstance(config.architecture, ViT):
        raise UserError(f"dropout={dropout!r}: the features of {config.family} have none; expected 0.0")
    if head == "own" and not config.classes:
        raise UserError("head='own': the checkpoint has no classifier; expected new or none")
    compute = Compute(jnp.dtype(DTYPES[dtype]), jnp.dtype(DTYPES[param_dtype]), remat, "auto", dropout)
    return VisionModel(config, head, {"own": config.classes, "new": classes, "none": 0}[head], compute, head_init)


def load(path, model: VisionModel, shardings: dict | None = None, key: jax.Array | None = None) -> dict:
    """Params of `model` from the checkpoint under `path`, strictly; see w2s_jax.models.weights.load.

    Raises:
      UserError: missing, surplus or mis-shaped tensors (all of them in one message), a type other than F32, F16, BF16, a file that
        cannot be read.
    """
    config, checkpoint = model.config, open_checkpoint(path)
    with_head, ignored, module = names_lib.FORMATS[config.format]
    prefix = with_head if with_head and any(name.startswith(with_head) for name in checkpoint.tensors) else ""
    names = names_lib.names(config, paths(model.abstract), prefix, head=model.head == "own")
    own = () if model.head == "own" else tuple(name for name in checkpoint.tensors if name.startswith(f"{module}."))
    says = "config.json says" if Path(path).is_dir() else f"a {type(config.architecture).__name__} of these sizes says"
    place = weights.Place(Path(path), says, ignored, own)
    return weights.fill(checkpoint, place, model, names, names_lib.order, shardings, key)


def stored_dtype(path) -> str:
    """The parameter type that keeps a checkpoint's digits: bfloat16 where all of its numbers (counters apart) are, else float32."""
    found = {tensor.dtype for tensor in open_checkpoint(path).tensors.values()} - {"I64"}
    return "bfloat16" if found == {"BF16"} else "float32"


def check_save(config: VisionConfig) -> None:
    """UserError where `save` has no format for such a model."""
    writing.check(config)


def save(folder, params: dict, model: VisionModel, class_names: tuple[str, ...] = ()) -> None:
    """Write `params` in Hugging Face's format; see w2s_jax.models.vision.writing.save."""
    writing.save(folder, params, model, class_names or (model.config.class_names if model.head == "own" else ()))
