"""Structural similarity of videos (Wang et al. 2004: Gaussian window 11 / 1.5, k1 0.01, k2 0.03)."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
DEVIATION = 1.5
K1, K2 = 0.01, 0.03


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Mean SSIM over positions, colours and frames: [b], fp32.

    Frames whose short side is about n x 256 pixels are averaged n x n first, as in the authors' code.

    Args:
        video, reference: [b, 3, f, h, w] in [-1, 1] (values outside are clamped).

    Raises:
        ValueError: shapes differ, or frames smaller than the window.
    """
    if video.shape != reference.shape or video.ndim != 5 or min(video.shape[3:]) < WINDOW:
        raise ValueError(
            f"two videos [b, 3, f, h, w] of one shape, sides at least {WINDOW}: "
            f"got {list(video.shape)}, {list(reference.shape)}"
        )
    x, y = _planes(video), _planes(reference)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).reshape(video.shape[0], -1).mean(dim=1)


def _planes(video: Tensor) -> Tensor:
    """[b, 3, f, h, w] in [-1, 1] -> [b * 3 * f, 1, h', w'] in [0, 1]."""
    planes = (video.float().clamp(-1, 1) + 1).div(2).flatten(0, 2).unsqueeze(1)
    factor = max(1, round(min(planes.shape[2:]) / 256))
    return F.avg_pool2d(planes, factor) if factor > 1 else planes


def _blur(planes: Tensor) -> Tensor:
    """Gaussian window, valid positions only: [n, 1, h, w] -> [n, 1, h - 10, w - 10].

    As two products with band matrices: sides are below 400 here, where this is many times faster than a convolution of
    one channel, forward and backward.
    """
    rows, columns = (_band(side, planes) for side in planes.shape[2:])
    return rows @ planes @ columns.T


def _band(side: int, like: Tensor) -> Tensor:
    """[side - 10, side]: row i holds the window over positions i .. i + 10."""
    offsets = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * DEVIATION**2))
    window = window / window.sum()
    rows = side - WINDOW + 1
    # One row and a zero more than it needs, repeated: each next row of `side` numbers starts one place earlier in it.
    return F.pad(window, (0, rows)).repeat(rows)[: rows * side].view(rows, side)
