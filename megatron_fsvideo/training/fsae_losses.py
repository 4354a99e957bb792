"""Reconstruction losses of the autoencoder (paper section 2.2: L1 + 0.1 perceptual; the others are for short runs)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.config import FSAETrainingConfig

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, video), both [n, 3, h, w] in [-1, 1] -> scalar."""


def reconstruction_loss(
    reconstruction: Tensor, video: Tensor, weights: FSAETrainingConfig, perceptual: PerceptualLoss | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and its unweighted parts by name.

    Args:
        reconstruction, video: [b, 3, f, h, w] in [-1, 1].
        perceptual: None where `perceptual_weight` is 0 or there is no trunk.
    """
    x, y = (tensor.float().transpose(1, 2).flatten(0, 1) for tensor in (reconstruction, video))  # (b * f, 3, h, w)
    parts = {"l1": F.l1_loss(x, y)}
    total = weights.l1_weight * parts["l1"]
    if weights.gradient_weight:
        parts["gradient"] = gradient_l1(x, y)
        total = total + weights.gradient_weight * parts["gradient"]
    if weights.multiscale_weight:
        parts["multiscale"] = multiscale_l1(x, y)
        total = total + weights.multiscale_weight * parts["multiscale"]
    if perceptual is not None:
        parts["perceptual"] = perceptual(x, y)
        total = total + weights.perceptual_weight * parts["perceptual"]
    return total, parts


def gradient_l1(x: Tensor, y: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, rows + columns: it rewards edges."""
    difference = x - y
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def multiscale_l1(x: Tensor, y: Tensor) -> Tensor:
    """L1 distance of 2x2 and 4x4 averages, summed: it rewards right colours over areas."""
    difference = x - y
    return F.avg_pool2d(difference, 2).abs().mean() + F.avg_pool2d(difference, 4).abs().mean()
