"""Peak signal-to-noise ratio of videos (as VidTok computes it: per frame, then averaged)."""

import torch
from torch import Tensor

EPSILON = 1e-8


def psnr_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """-10 log10 of the mean squared error on [0, 1], in dB.

    Args:
        video, reference: [b, 3, f, h, w] in [-1, 1] (values outside are clamped).

    Returns:
        [b, f], fp32.
    """
    _check_shapes(video, reference)
    difference = (video.float().clamp(-1, 1) - reference.float().clamp(-1, 1)) / 2
    return -10 * torch.log10(difference.square().mean(dim=(1, 3, 4)) + EPSILON)


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Mean over the frames of `psnr_per_frame`: [b]."""
    return psnr_per_frame(video, reference).mean(dim=1)


def _check_shapes(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or video.ndim != 5:
        raise ValueError(f"two videos [b, 3, f, h, w] of one shape, got {list(video.shape)}, {list(reference.shape)}")
