"""The numbers of a vision model: what is read from its checkpoint, and what the modules are built from."""

from dataclasses import dataclass

from w2s_jax.models.architecture import Architecture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as torchvision has them


@dataclass(frozen=True)
class AlexNet:
    """Krizhevsky 2014 ("One weird trick ..."), as torchvision has it. `widths`: channels of the five convolutions; `dense`: of the
    published classifier's two hidden layers."""

    widths: tuple[int, ...]
    dense: tuple[int, int]


@dataclass(frozen=True)
class ResNet:
    """He et al. 2016. `stem`: channels of the first convolution, 7x7 with a pooling behind it, or 3x3 without (`small`: CIFAR's).

    `widths`: channels of each stage's output; `inner`: those inside a bottleneck's block (= widths in a basic one); `depths`:
    blocks of each stage. A stage's first block halves the image, the first stage's only if `stride_first`; a bottleneck does so in
    its first convolution if `stride_in_first`, else in its second (torchvision's v1.5). `padded`: shortcuts across sizes subsample
    and add channels of zeros (option A), else they are a 1x1 convolution (option B). `activation`: one of layers.ACTIVATIONS, of the
    stem and behind the sums; inside a block it is ReLU.
    """

    stem: int
    widths: tuple[int, ...]
    inner: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool
    small: bool = False
    padded: bool = False
    stride_first: bool = False
    stride_in_first: bool = False
    activation: str = "relu"
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ViT:
    """Dosovitskiy et al. 2021, with the additions of DINOv2 (Oquab et al. 2023: layer scale, in `stack`; Darcet et al. 2024: registers).

    `stack`: the transformer's layers. `patch`: pixels a side. `grid`: patches a side that the position embeddings are made for;
    at other sizes they are resized: `offset` is added to the new side before the ratio is taken (DINO: 0.1), `antialias` widens the
    filter where there are fewer. `registers`: further tokens without position. `wide`: the published classifier reads the class
    token and the mean of the patches' [2 * embed], else the class token [embed]. `token_std`: initialisation of the class token and
    the registers, None = as everything else.
    """

    stack: Architecture
    patch: int
    grid: int
    registers: int = 0
    offset: float = 0.0
    antialias: bool = False
    wide: bool = False
    token_std: float | None = None


@dataclass(frozen=True)
class VisionConfig:
    """A vision model and the preprocessing that it was evaluated with.

    `resize`: pixels of the shorter side, or of both if `squeeze`; 0 = the image's own size. `crop`: pixels a side of the central
    square. `interpolation`: bilinear | bicubic.
    """

    family: str  # alexnet | resnet | vit
    format: str  # of the checkpoint, one of formats.FORMATS: whose names its tensors have
    embed: int  # numbers that `features` gives for an image
    classes: int  # of the checkpoint's own head; 0 = it has none
    class_names: tuple[str, ...]  # () = not told
    image: int  # pixels a side that it was trained at
    architecture: AlexNet | ResNet | ViT
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    squeeze: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
