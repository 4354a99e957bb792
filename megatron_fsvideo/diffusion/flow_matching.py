"""Flow matching on straight paths (paper section 3; Lipman et al. 2023; Esser et al. 2024 for the noise levels).

noisy_latents = (1 - sigma) * latents + sigma * noise        sigma 1 is noise, 0 is data
velocity      = noise - latents                              d noisy_latents / d sigma
timestep      = 1000 * sigma                                 what the time embedding receives
"""

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000.0
# Below this noise level the velocity of a predicted sample is no longer divided by sigma alone: 1/sigma diverges.
MIN_SAMPLE_SIGMA = 0.05


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels toward noise: a sigma / (1 + (a - 1) sigma), equal to adding ln a to a logit-normal's mean."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(normals: Tensor, mean: float, std: float, shift: float = 1.0) -> Tensor:
    """Noise levels [b] from standard normal draws [b]: sigmoid(mean + std * n), shifted."""
    return shift_sigmas(torch.sigmoid(mean + std * normals), shift)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Noisy latents [b, c, t, h, w] at the noise levels sigmas [b]."""
    sigmas = _per_sample(sigmas, latents)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Target of a velocity model."""
    return noise - latents


def to_timesteps(sigmas: Tensor) -> Tensor:
    """Timesteps [b], fp32: bf16 would step by 4 near 1000."""
    return NUM_TRAIN_TIMESTEPS * sigmas.float()


def to_velocity(prediction: Tensor, noisy_latents: Tensor, sigmas: Tensor, prediction_type: str) -> Tensor:
    """The velocity that a model's output stands for.

    Args:
        prediction: the model's output, shape of `noisy_latents`.
        noisy_latents: the model's input [b, ...].
        sigmas: noise levels [b].
        prediction_type: "velocity", or "sample" for a model that puts out clean latents.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "velocity":
        return prediction
    if prediction_type == "sample":
        return (noisy_latents - prediction) / _per_sample(sigmas, noisy_latents).clamp(min=MIN_SAMPLE_SIGMA)
    raise ValueError(f"prediction_type is velocity or sample, got {prediction_type!r}")


def white_latents_bound(sigmas: Tensor) -> Tensor:
    """Velocity MSE per sigma of the best possible model on white unit-variance latents: 1 / (sigma^2 + (1 - sigma)^2).

    A model below this has learnt structure. (For latents z and noise e, both N(0, 1), the variance of e - z given
    (1 - sigma) z + sigma e is 2 - (2 sigma - 1)^2 / (sigma^2 + (1 - sigma)^2), which equals this.)
    """
    return 1 / (sigmas**2 + (1 - sigmas) ** 2)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
