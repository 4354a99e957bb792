"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def guided(conditional: Velocity, unconditional: Velocity, guidance_scale: float) -> Velocity:
    """A velocity function that extrapolates from the unconditional to the conditional one.

    Args:
        conditional: (noisy_latents, sigmas) -> velocity with the prompt.
        unconditional: the velocity with the negative or the empty prompt; never called at scale 1.
        guidance_scale: 1 is the conditional model alone.
    """
    if guidance_scale == 1.0:
        return conditional

    def velocity(noisy_latents: Tensor, sigmas: Tensor) -> Tensor:
        without = unconditional(noisy_latents, sigmas)
        return without + guidance_scale * (conditional(noisy_latents, sigmas) - without)

    return velocity
