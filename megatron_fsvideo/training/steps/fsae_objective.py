"""What the autoencoder minimises in phase 1 (paper section 2.2.3, fsae_spec section 4): means over all elements."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.config import FSAETrainingConfig
from megatron_fsvideo.evaluation.perceptual import PerceptualLoss
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.losses.lpips import sliced_perceptual_loss
from megatron_fsvideo.parallel.seeds import sample_generator

SCALES = (2, 4)


def reconstruction_loss(
    reconstruction: Tensor, video: Tensor, weights: FSAETrainingConfig, perceptual: PerceptualLoss | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its unweighted parts, by name. Both videos [b, 3, f, h, w]; computed in fp32."""
    reconstruction = reconstruction.float()
    parts = {"l1": F.l1_loss(reconstruction, video)}
    loss = weights.l1_weight * parts["l1"]
    if weights.gradient_weight > 0:
        parts["gradient"] = gradient_l1(reconstruction, video)
        loss = loss + weights.gradient_weight * parts["gradient"]
    if weights.multiscale_weight > 0:
        parts["multiscale"] = multiscale_l1(reconstruction, video)
        loss = loss + weights.multiscale_weight * parts["multiscale"]
    if weights.ssim_weight > 0:
        parts["ssim"] = 1 - ssim(reconstruction, video).mean()
        loss = loss + weights.ssim_weight * parts["ssim"]
    if perceptual is not None:
        frames = weights.perceptual_frames
        parts["perceptual"] = sliced_perceptual_loss(perceptual, reconstruction, video, frames)
        loss = loss + weights.perceptual_weight * parts["perceptual"]
    return loss, {name: part.detach() for name, part in parts.items()}


def gradient_l1(reconstruction: Tensor, video: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, rows + columns: it rewards edges."""
    error = reconstruction - video
    return error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()


def multiscale_l1(reconstruction: Tensor, video: Tensor) -> Tensor:
    """L1 distance of frames averaged over 2x2 and over 4x4 pixels, summed: it rewards right colours over areas."""
    error = reconstruction - video
    return torch.stack([F.avg_pool3d(error, (1, scale, scale)).abs().mean() for scale in SCALES]).sum()


def latent_penalty(latents: Tensor) -> Tensor:
    """By how much the mean square of the latents exceeds 1, a scalar.

    Nothing else sets their scale, and Muon's steps do not shrink with the gradient: left alone the scale runs away, and
    residual branches of unit size no longer matter beside it.
    """
    return torch.relu(latents.float().square().mean() - 1)


def draw_latent_noise(seed: int, first: int, shape: tuple[int, ...], strength: float) -> Tensor:
    """Noise for the latents of samples first, first + 1, ...: [b, c, t, h, w], each sample at its own level.

    Args:
        shape: (b, c, t, h, w).
        strength: levels are uniform in [0, strength].
    """
    rows = []
    for index in range(first, first + shape[0]):
        generator = sample_generator(seed, index, 0, "latent_noise")
        level = strength * torch.rand((), generator=generator)
        rows.append(level * torch.randn(shape[1:], generator=generator))
    return torch.stack(rows)
