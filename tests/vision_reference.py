"""Vision models in PyTorch, written from the papers and the authors' descriptions, with the authors' names of tensors.

torchvision is not installed where the tests run; transformers has its own classes for the rest.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class AlexNet(nn.Module):
    """Krizhevsky 2014, in torchvision's arrangement of modules."""

    def __init__(self, widths=(64, 192, 384, 256, 256), dense=(4096, 4096), classes=1000):
        super().__init__()
        a, b, c, d, e = widths
        relu, pool = lambda: nn.ReLU(), lambda: nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 11, 4, 2), relu(), pool(), nn.Conv2d(a, b, 5, padding=2), relu(), pool(), nn.Conv2d(b, c, 3, padding=1), relu(),
            nn.Conv2d(c, d, 3, padding=1), relu(), nn.Conv2d(d, e, 3, padding=1), relu(), pool())
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(e * 36, dense[0]), relu(), nn.Dropout(), nn.Linear(*dense), relu(),
                                        nn.Linear(dense[1], classes))

    def embed(self, x):
        return self.avgpool(self.features(x)).flatten(1)

    def forward(self, x):
        return self.classifier(self.embed(x))


def _conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """A basic block (two 3x3) or a bottleneck (1x1, 3x3 with the stride, 1x1), He et al. 2016."""

    def __init__(self, inputs, inner, outputs, stride, bottleneck, padded):
        super().__init__()
        self.conv1 = _conv(inputs, inner, 1) if bottleneck else _conv(inputs, outputs, 3, stride)
        self.conv2 = _conv(inner, inner, 3, stride) if bottleneck else _conv(outputs, outputs, 3)
        self.bn1, self.bn2 = (nn.BatchNorm2d(inner if bottleneck else outputs) for _ in range(2))
        if bottleneck:
            self.conv3, self.bn3 = _conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = None
        self.padded, self.stride, self.extra = padded, stride, outputs - inputs
        if not padded and (stride != 1 or inputs != outputs):
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.extra or self.stride > 1:
            zeros = torch.zeros_like(x[:, :1, :: self.stride, :: self.stride]).expand(-1, self.extra // 2, -1, -1)
            x = torch.cat([zeros, x[:, :, :: self.stride, :: self.stride], zeros], dim=1)
        return F.relu(x + y)


class ResNet(nn.Module):
    """torchvision's names; with `small` the CIFAR networks of He et al. 2016, section 4.2, whose head is called linear."""

    def __init__(self, depths, stem=64, inner=(64, 128, 256, 512), expansion=4, classes=1000, bottleneck=True, small=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False), nn.BatchNorm2d(stem)
        inputs, self.small, self.stages = stem, small, len(depths)
        for s, (width, depth) in enumerate(zip(inner, depths)):
            outputs, blocks = width * expansion, []
            for b in range(depth):
                blocks.append(Block(inputs, width, outputs, 2 if s and not b else 1, bottleneck, small))
                inputs = outputs
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
        self.head_name = "linear" if small else "fc"
        if classes:
            setattr(self, self.head_name, nn.Linear(inputs, classes))

    def embed(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        for s in range(self.stages):
            x = getattr(self, f"layer{s + 1}")(x)
        return x.mean((2, 3))

    def forward(self, x):
        return getattr(self, self.head_name)(self.embed(x))


class _LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width), heads

    def forward(self, x):
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(images, tokens, width))


class _Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class _SwiGlu(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class _Layer(nn.Module):
    def __init__(self, width, heads, hidden, bias, scaled, swiglu):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, bias)
        self.mlp = (_SwiGlu if swiglu else _Mlp)(width, hidden)
        if scaled:
            self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)
        self.scaled = scaled

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + (self.ls1(y) if self.scaled else y)
        y = self.mlp(self.norm2(x))
        return x + (self.ls2(y) if self.scaled else y)


class _PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """DINO's ViT, with `scaled` (layer scale), `registers` and `swiglu` DINOv2's; heads are 64 wide.

    `offset`, `antialias`: how the position embeddings are resized (facebookresearch/dino: an offset of 0.1 in the scale factor;
    facebookresearch/dinov2: the same, but by size and with antialiasing for the models with registers).
    """

    def __init__(self, width=128, layers=3, patch=8, grid=4, hidden=160, classes=0, bias=True, scaled=False, registers=0, swiglu=False,
                 offset=0.1, antialias=False):
        super().__init__()
        self.patch_embed = _PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        if scaled:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.blocks = nn.ModuleList(_Layer(width, width // 64, hidden, bias, scaled, swiglu) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if classes:
            self.head = nn.Linear(width, classes)
        self.patch, self.grid, self.registers, self.offset, self.antialias = patch, grid, registers, offset, antialias

    def positions(self, height, width):
        rows, columns = height // self.patch, width // self.patch
        if rows * columns == self.grid**2 and height == width:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        if self.offset:
            size = {"scale_factor": ((rows + self.offset) / self.grid, (columns + self.offset) / self.grid)}
        else:
            size = {"size": (rows, columns)}
        table = F.interpolate(table, mode="bicubic", antialias=self.antialias, **size)
        assert table.shape[2:] == (rows, columns)
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def embed(self, x):
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1) + positions
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def forward(self, x):
        return self.head(self.embed(x))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave no part of the model without effect; for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 4:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 2 and "token" not in name:
                tensor.copy_(noise / tensor.shape[1] ** 0.5)
            elif name.endswith((".weight", "gamma", "lambda1")):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model.eval()
