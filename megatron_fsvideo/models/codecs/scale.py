"""The scale of latents: the one place that normalises them and restores them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """Mean and standard deviation per channel of a latent dataset. The DiT sees latents of mean 0 and deviation 1."""

    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as stored [..., c, t, h, w] -> normalised ones, in the same dtype."""
        return (latents - _per_channel(self.mean, latents)) / _per_channel(self.std, latents)

    def restore(self, latents: Tensor) -> Tensor:
        """Normalised latents [..., c, t, h, w] -> as stored: what a decoder takes."""
        return latents * _per_channel(self.std, latents) + _per_channel(self.mean, latents)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)
