"""Randomness belongs to a named thing (a sample, a weight), never to a rank: every layout draws the same numbers."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and names, the same in every process and version of Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_generator(seed: int, sample_id: int, epoch: int, role: str) -> torch.Generator:
    """CPU generator of one sample's random numbers in one epoch; `role` tells noise from sigma from dropout."""
    return torch.Generator().manual_seed(derive_seed(seed, sample_id, epoch, role))


def weight_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator of one weight's initial values; `name` is its name in the whole model."""
    return torch.Generator().manual_seed(derive_seed(seed, "weight", name))
