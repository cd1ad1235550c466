"""Resizing as matrices, made on the host in float64: torch's bicubic interpolation and its adaptive average pooling."""

import math

import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at distances `x`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(size: int, new: int, *, ratio: float | None = None, antialias: bool = False) -> np.ndarray:
    """float64 [new, size]: torch.nn.functional.interpolate(mode="bicubic", align_corners=False) along one axis.

    `ratio`: new / old as the caller of torch gave it (scale_factor); None = of the sizes. `antialias`: the filter of Pillow
    (a = -0.5), stretched where the result is smaller, cut off and normalised at the borders; else a = -0.75 on four neighbours, those
    outside replaced by the border's.
    """
    scale = size / new if ratio is None else 1 / ratio
    matrix = np.zeros((new, size))
    for i in range(new):
        if antialias:
            stretch = max(scale, 1.0)
            center = scale * (i + 0.5)
            low, high = max(int(center - 2 * stretch + 0.5), 0), min(int(center + 2 * stretch + 0.5), size)
            weights = _cubic((np.arange(low, high) + 0.5 - center) / stretch, -0.5)
            matrix[i, low:high] = weights / weights.sum()
        else:
            at = scale * (i + 0.5) - 0.5
            first = math.floor(at) - 1
            for j in range(first, first + 4):
                matrix[i, min(max(j, 0), size - 1)] += _cubic(np.asarray(at - j), -0.75)
    return matrix


def adaptive_mean(size: int, new: int) -> np.ndarray:
    """float64 [new, size]: torch.nn.AdaptiveAvgPool along one axis, whose windows may overlap."""
    matrix = np.zeros((new, size))
    for i in range(new):
        low, high = i * size // new, -(-(i + 1) * size // new)
        matrix[i, low:high] = 1 / (high - low)
    return matrix
