"""Reading config.json: typed keys with one-line errors, and what several families share (rotary scaling, layer types)."""

import math

import numpy as np

from w2s_jax.errors import UserError, nearest
from w2s_jax.models.architecture import Rope
from w2s_jax.models.layers import ACTIVATIONS

FULL, SLIDING = "full_attention", "sliding_attention"
REQUIRED = object()


class Fields:
    """The keys of one config.json. Every method raises UserError with file, key, value and what was expected."""

    def __init__(self, raw: dict, file: str):
        self.raw, self.file = raw, file

    def error(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.file}: {key}={self.raw.get(key)!r} is not supported; expected {expected}")

    def _value(self, key: str, default, kinds: tuple, expected: str):
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                raise UserError(f"{self.file}: key {key!r} is missing; {self.raw.get('model_type')} needs it")
            return default
        if type(value) not in kinds:
            raise UserError(f"{self.file}: {key}={value!r} is not a {expected}")
        return value

    def size(self, key: str, default=REQUIRED) -> int:
        """A positive integer."""
        value = self._value(key, default, (int,), "positive int")
        if value is not None and value <= 0:
            raise UserError(f"{self.file}: {key}={value!r} is not a positive int")
        return value

    def number(self, key: str, default=REQUIRED) -> float:
        """A positive finite number."""
        value = self._value(key, default, (int, float), "positive float")
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{self.file}: {key}={value!r} is not a positive float")
        return value if value is None else float(value)

    def flag(self, key: str, default=REQUIRED) -> bool:
        return self._value(key, default, (bool,), "bool")

    def activation(self, key: str, default=REQUIRED) -> str:
        value = self._value(key, default, (str,), "str")
        if value not in ACTIVATIONS:
            raise UserError(f"{self.file}: {key}={value!r} is not supported{nearest(value, ACTIVATIONS)}; "
                            f"expected one of {', '.join(ACTIVATIONS)}")
        return value

    def only(self, **values) -> None:
        """Each key is absent, null or has this value: what it would change otherwise is not written here."""
        for key, value in values.items():
            if self.raw.get(key, value) not in (value, None):
                raise self.error(key, str(value))

    def heads(self, embed: int, key: str = "num_attention_heads", *, grouped: bool = False) -> tuple[int, int, int]:
        """(heads, key-value heads, width of a head). `grouped`: a family whose config.json may say how many key-value heads
        there are, and a width other than embed / heads."""
        heads = self.size(key)
        kv_heads = self.size("num_key_value_heads", heads) if grouped else heads
        head_dim = self.size("head_dim", None) if grouped else None
        if heads % kv_heads:
            raise UserError(f"{self.file}: {key}={heads} is not a multiple of num_key_value_heads={kv_heads}")
        if head_dim is None:
            head_dim, rest = divmod(embed, heads)
            if rest:
                raise UserError(f"{self.file}: {key}={heads} does not divide the width {embed}")
        return heads, kv_heads, head_dim

    def layer_types(self, layers: int, default) -> list[str]:
        """One of FULL and SLIDING a layer: the key `layer_types`, else `default(i)`, true where layer i slides."""
        types = self.raw.get("layer_types")
        if types is None:
            return [SLIDING if default(i) else FULL for i in range(layers)]
        if not isinstance(types, list) or len(types) != layers or set(types) - {FULL, SLIDING}:
            raise self.error("layer_types", f"{layers} of {FULL} and {SLIDING}")
        return types

    # ----------------------------------------------------------------- rotary position embedding

    def rope(self, head_dim: int, max_positions: int, *, theta_key: str = "rope_theta", theta: float = 10_000.0,
             share: float = 1.0, layer_type: str | None = None, scaled: bool = True) -> tuple[Rope, int]:
        """The rotary embedding and the positions that it serves, from the old keys (`theta_key`, `rope_scaling`,
        `partial_rotary_factor`) or the new one (`rope_parameters`, by layer type where `layer_type` is given).

        `theta`, `share` (of a head's width that turns): the family's defaults. `scaled=False`: `rope_scaling` is another
        layer type's. After transformers' modeling_rope_utils.py.
        """
        given = self.raw.get("rope_parameters")
        if given is not None and not isinstance(given, dict):
            raise self.error("rope_parameters", "an object")
        given = dict(given or {})
        if layer_type and given:
            if not isinstance(given.get(layer_type), dict):
                raise UserError(f"{self.file}: rope_parameters has no {layer_type!r}; expected values for each layer type")
            given = dict(given[layer_type])
        elif by_type := [key for key, value in given.items() if isinstance(value, dict)]:
            raise UserError(f"{self.file}: rope_parameters has values by layer type ({', '.join(by_type)}); "
                            "expected one set for all layers")
        where = Fields(given, f"{self.file}: rope_parameters")
        theta = where.number("rope_theta", self.number(theta_key, theta))
        share = where.number("partial_rotary_factor", share)
        if scaled and isinstance(self.raw.get("rope_scaling"), dict):
            given |= self.raw["rope_scaling"]
            where = Fields(given, f"{self.file}: rope_scaling")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in SCALINGS:
            raise UserError(f"{where.file}: rope_type={kind!r} is not supported{nearest(str(kind), SCALINGS)}; expected one of "
                            f"{', '.join(SCALINGS)}")
        dim = int(head_dim * share)
        if dim % 2 or dim > head_dim:
            raise UserError(f"{self.file}: {share} of a head's width {head_dim} is {dim}; expected an even number of features that turn")
        original = where.size("original_max_position_embeddings", self.size("original_max_position_embeddings", max_positions))
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
        frequencies, scale, reach = SCALINGS[kind](where, frequencies, theta, original, max_positions)
        return Rope(tuple(float(f) for f in frequencies), scale), reach


def _default(where, frequencies, theta, original, reach):
    return frequencies, 1.0, reach


def _linear(where, frequencies, theta, original, reach):
    return frequencies / where.number("factor"), 1.0, reach


def _dynamic(where, frequencies, theta, original, reach):
    """The base grows with the text beyond max_position_embeddings, and only there: shorter documents are served as they are."""
    return frequencies, 1.0, reach


def _llama3(where, frequencies, theta, original, reach):
    factor, low, high = (where.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise where.error("high_freq_factor", f"more than low_freq_factor={low}")
    turns = original * frequencies / (2 * math.pi)  # in the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0, reach


def _yarn(where, frequencies, theta, original, reach):
    factor = where.number("factor", max(reach / original, 1.0))
    fast, slow = where.number("beta_fast", 32.0), where.number("beta_slow", 1.0)
    dim = 2 * len(frequencies)

    def feature(turns):  # the one that makes `turns` turns in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(fast), feature(slow)
    if where.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)  # 0 = keep, 1 = interpolate

    def magnitude(by):
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    m, m_all = where.number("mscale", None), where.number("mscale_all_dim", None)
    scale = where.number("attention_factor", magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1.0))
    return frequencies / factor * ramp + frequencies * (1 - ramp), scale, reach


def _longrope(where, frequencies, theta, original, reach):
    """The short factors serve documents within the original context, and no longer ones are taken (the long factors would
    turn every token of a long text otherwise, its first ones too)."""
    short = where.raw.get("short_factor")
    if not isinstance(short, list) or len(short) != len(frequencies) or not all(type(f) in (int, float) and f > 0 for f in short):
        raise where.error("short_factor", f"{len(frequencies)} positive numbers")
    factor = where.number("factor", reach / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies / np.asarray(short, float), where.number("attention_factor", scale), original


SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
            "su": _longrope}
