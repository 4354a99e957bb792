"""The Euler method on the probability-flow ODE of flow matching, which turns noise into latents."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_fsvideo.diffusion.flow_matching import shift_sigmas


def euler_sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels [n + 1] from 1 to 0, equally spaced and then shifted.

    Raises:
        ValueError: fewer than one step.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return shift_sigmas(torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64), shift).float()


def euler_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Integrate d x / d sigma = velocity(x, sigma) from noise to data. Gradients flow where the caller lets them.

    Args:
        velocity: (noisy_latents [b, ...], sigmas [b]) -> velocity [b, ...].
        noise: the state at sigmas[0] [b, ...].
        sigmas: falling noise levels [n + 1].
        progress: wraps the step indices, as tqdm does.

    Returns:
        latents [b, ...] at sigmas[-1].
    """
    latents = noise
    for index in progress(range(len(sigmas) - 1)):
        level = sigmas[index].expand(len(latents)).to(latents.device)
        step_size = (sigmas[index + 1] - sigmas[index]).item()
        latents = latents + step_size * velocity(latents, level)
    return latents
