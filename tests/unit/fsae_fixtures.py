"""Tiny autoencoders of each kind with random weights everywhere, in fp64, so that equalities are exact."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae import FSAE, StreamCache


def config(decoder: str = "causal", **changes) -> FSAEConfig:
    """Four stages: two residual, two with attention; 8x8x4. Lite is narrower at the pixel side."""
    values = {
        "widths": (8, 8, 16, 16),
        "encoder_depths": (1, 1, 1, 1),
        "decoder_depths": (1, 1, 1, 1),
        "attention_stages": 2,
        "latent_channels": 4,
        "attention_head_dim": 8,
        "first_frame_head_dim": 8,
        "first_frame_window": 4,
        "decoder": decoder,
        "decoder_widths": (4, 8, 16, 16) if decoder == "lite" else None,
    }
    return FSAEConfig(**(values | changes))


def patch_config(decoder: str = "causal", **changes) -> FSAEConfig:
    """Five stages with three residual ones: what patch training cuts at. 16x16x4."""
    widths = (4, 8, 8, 8, 8)
    values = {"widths": widths, "encoder_depths": (1,) * 5, "decoder_depths": (1,) * 5, "decoder_widths": None}
    return config(decoder, **(values | changes))


def build(fsae_config: FSAEConfig, seed: int = 0) -> FSAE:
    """Random everywhere: gains, biases, taps and zero starts included, so that no path is silent."""
    torch.manual_seed(seed)
    fsae = FSAE(fsae_config).double().eval().requires_grad_(False)
    for parameter in fsae.parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.5 + torch.rand_like(parameter))
    for attention in fsae.decoder.first_frame:
        attention.out.weight.copy_(0.3 * torch.randn_like(attention.out.weight))
    return fsae


def random_video(num_frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 0) -> Tensor:
    """[batch, 3, f, h, w] in [-1, 1], fp64."""
    generator = torch.Generator().manual_seed(num_frames + 1000 * seed)
    return torch.rand(batch, 3, num_frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def random_latents(fsae_config: FSAEConfig, num: int, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    """[batch, c, num, h, w], fp64."""
    generator = torch.Generator().manual_seed(num)
    shape = (batch, fsae_config.latent_channels, num, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def decode_chunks(fsae: FSAE, chunks: Sequence[Tensor], features: list[Tensor] | None = None) -> list[Tensor]:
    """What a stream of latents decodes to, part by part."""
    cache = StreamCache()
    return [fsae.decode_chunk(chunk, cache, features) for chunk in chunks]


def count_attention(fsae: FSAE) -> Counter[int]:
    """Calls, from now on, of each of the decoder's attention modules to the first frame."""
    calls: Counter[int] = Counter()
    for number, attention in enumerate(fsae.decoder.first_frame):
        attention.register_forward_hook(lambda *_, number=number: calls.update([number]))
    return calls


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    assert a.shape == b.shape, f"{list(a.shape)} and {list(b.shape)}"
    return float((a - b).abs().max() / b.abs().max())
