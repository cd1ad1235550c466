"""The numbers of an architecture: what a family reads from a checkpoint's config.json, and what the one stack of layers is built from."""

from dataclasses import dataclass

# Where a layer's norms stand (x = its input, f = attention, then MLP):
RESIDUAL = {
    "pre": "x + f(norm(x))",  # GPT-2, Llama
    "parallel": "x + attention(norm1(x)) + mlp(norm2(x))",  # GPT-NeoX
    "branch": "x + norm(f(x))",  # OLMo 2
    "sandwich": "x + norm_post(f(norm(x)))",  # Gemma 2 and 3
    "post": "norm(x + f(x))",  # BERT
}
NORMS = ("layer", "rms", "rms_plus_one")  # rms_plus_one multiplies by 1 + scale (Gemma)
QKV = ("split", "fused", "interleaved")  # three matrices | one, q then k then v | one, q k v of each head in turn (GPT-NeoX)
MLPS = ("plain", "gated", "fused")  # down(act(up)) | down(act(gate) * up) | the same with [gate, up] in one matrix


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), in the convention of halves: feature i turns with feature i + width/2.

    `frequencies`: radians a token of each pair of features, as many as half the rotated width, which may be less than a
    head's. `scale` multiplies cosines and sines (YaRN, LongRoPE).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Kind:
    """One kind of layer: how far its attention reaches and how its positions turn.

    `window`: a causal token sees itself and the `window - 1` tokens before it, a bidirectional one the tokens at most
    `window` away; None = its whole document.
    """

    window: int | None = None
    rope: Rope | None = None


@dataclass(frozen=True)
class Architecture:
    """A transformer. Sizes have no defaults: they come from config.json; a feature's default is its absence."""

    family: str  # model_type in config.json
    vocab: int  # token ids are 0 .. vocab - 1
    embed: int
    layers: int
    heads: int
    kv_heads: int  # each serves heads / kv_heads query heads
    head_dim: int
    mlp: int  # width of the MLP's hidden layer
    max_positions: int  # tokens in the longest document
    activation: str  # one of layers.ACTIVATIONS
    norm_eps: float
    init_std: float  # standard deviation of the published initialisation
    attention_scale: float  # scores are multiplied by it

    causal: bool = True  # False = an encoder: every token of a document sees all of it
    tied: bool = True  # the language model's head is the transposed token embedding
    norm: str = "layer"  # one of NORMS
    norm_bias: bool = True
    residual: str = "pre"  # one of RESIDUAL
    first_norm: bool = True  # False = the first layer's attention has no norm before it (ModernBERT)
    final_norm: bool = True
    layer_scale: float | None = None  # initial value of the learned factors on both branches (DINOv2); None = no such factors
    scaled_init: bool = True  # matrices that write to the residual stream start smaller by sqrt(2 * layers) (GPT-2)
    qkv: str = "split"  # one of QKV
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: str = ""  # "" | head (each head's features, Qwen3) | whole (all heads' together, OLMo 2)
    mlp_kind: str = "plain"  # one of MLPS
    mlp_bias: bool = True
    scale_by_layer: bool = False  # scores / (index of the layer + 1) besides
    attention_cap: float | None = None  # scores become cap * tanh(score / cap)
    logit_cap: float | None = None  # the language model's logits, likewise

    learned_positions: int = 0  # rows of the position table; 0 = none
    position_offset: int = 0  # row of the first position (RoBERTa: 2)
    types: int = 0  # rows of the token-type table; every token is of type 0
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_std: float | None = None  # of the token embedding's initialisation, where it is not init_std

    kinds: tuple[Kind, ...] = (Kind(),)
    kind_of: tuple[int, ...] = ()  # index into `kinds` of each layer; () = all 0

    # What the family's own classifier reads (last | first | mean), and the layer between that and its linear head:
    readout: str = "last"
    pooler: str = ""  # "" (none) | loaded (from the checkpoint) | fresh (not pretrained: RoBERTa)
    pooler_activation: str = "tanh"
    pooler_bias: bool = True
    pooler_norm: bool = False
