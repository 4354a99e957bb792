"""The latent upsampler's loss and its inputs (paper section 2.4.1). There is no training job for it yet.

A clip and its half-sized copy are encoded; the upsampler makes the clip's latents of the copy's:

L = 0.1 |z' - z| + 0.1 |D(z') - x| + alpha_3 LPIPS(D(z'), x)        alpha_3 rises from 0.1 to 1

Autoencoder weights are frozen. The encoder keeps no graph; the decoder passes the gradient on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.config import LatentUpsamplingLossConfig
from megatron_fsvideo.losses.lpips import sliced_perceptual_loss
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.latent_upsampler import FACTOR


@dataclass(frozen=True)
class UpsamplingPair:
    """One batch, without gradient.

    Attributes:
        low, high: normalised latents [b, c, t, h, w] and [b, c, t, 2h, 2w] of the same clips.
        first_frame_features: of the large clips' first frames, for a decoder that attends to them.
    """

    low: Tensor
    high: Tensor
    first_frame_features: list[Tensor]


def half_sized(video: Tensor) -> Tensor:
    """[b, 3, f, 2h, 2w] in [-1, 1] -> [b, 3, f, h, w]: bicubic with antialias, cut to [-1, 1], as edges overshoot."""
    size = [side // FACTOR for side in video.shape[3:]]
    frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), size, mode="bicubic", antialias=True)
    return frames.clamp(-1, 1).unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


@torch.no_grad()
def encode_pair(fsae: FSAE, video: Tensor, scale: LatentScale) -> UpsamplingPair:
    """Latents of a clip [b, 3, 4k+1, H, W] in [-1, 1] and of its half-sized copy.

    Raises:
        ValueError: sides whose halves the autoencoder does not take, or frames other than 4k+1.
    """
    unit = FACTOR * fsae.spatial_factor
    height, width = video.shape[3:]
    if height % unit or width % unit:
        raise ValueError(
            f"sides must be multiples of {unit}, so that half of them are multiples of {fsae.spatial_factor}: got "
            f"{height}x{width}; crop to {height // unit * unit}x{width // unit * unit}, or pad"
        )
    low, high = (scale.normalize(fsae.encode(clip)) for clip in (half_sized(video), video))
    return UpsamplingPair(low, high, fsae.first_frame_features(video[:, :, :1]))


def decode_upsampled(
    fsae: FSAE, upsampled: Tensor, scale: LatentScale, first_frame_features: Sequence[Tensor], noise_seed: int = 0
) -> Tensor:
    """Normalised latents [b, c, k+1, h, w] -> video [b, 3, 4k+1, h*s, w*s]; the gradient flows to the latents alone.

    Raises:
        ValueError: weights of the autoencoder that are not frozen.
    """
    if any(parameter.requires_grad for parameter in fsae.parameters()):
        raise ValueError("the upsampler's losses must not train the autoencoder: call fsae.requires_grad_(False) first")
    return fsae.decode(scale.restore(upsampled), first_frame_features, noise_seed)


def perceptual_weight(config: LatentUpsamplingLossConfig, iteration: int, train_iters: int) -> float:
    """alpha_3 at `iteration` (from 0) of `train_iters`: a straight line, then constant."""
    ramp = config.perceptual_ramp * train_iters
    done = min(1.0, iteration / ramp) if ramp else 1.0
    return config.perceptual_weight_start + done * (config.perceptual_weight_end - config.perceptual_weight_start)


def upsampling_loss(
    config: LatentUpsamplingLossConfig,
    latents: tuple[Tensor, Tensor],
    videos: tuple[Tensor, Tensor],
    perceptual: PerceptualLoss,
    alpha: float,
    perceptual_frames: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a scalar, and its unweighted parts by name.

    Args:
        latents: the upsampler's and the encoder's, [b, c, t, h, w], normalised.
        videos: the decoder's and the true one, [b, 3, f, h, w] in [-1, 1]; or the same box of both.
        alpha: from `perceptual_weight`.
        perceptual_frames: `PerceptualLossConfig.perceptual_frames`.

    Raises:
        ValueError: shapes that differ, which would be broadcast.
    """
    for ours, theirs in (latents, videos):
        if ours.shape != theirs.shape:
            raise ValueError(f"shapes differ: {list(ours.shape)} and {list(theirs.shape)}")
    parts = {"latent": F.l1_loss(*latents), "l1": F.l1_loss(*videos)}
    parts["perceptual"] = sliced_perceptual_loss(perceptual, *videos, perceptual_frames)
    loss = config.latent_weight * parts["latent"] + config.pixel_weight * parts["l1"] + alpha * parts["perceptual"]
    return loss, {name: value.detach() for name, value in parts.items()}
