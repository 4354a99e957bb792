"""Embeds the DiT's conditions (timestep, text, image) to the token stream's width.

Letters: b samples, l text tokens, n image tokens, h hidden size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.models.dit.tokens import append_rows, round_up

NUM_MODULATIONS = 6  # shift, scale and gate, for self-attention and for the feed-forward layer


class Context(NamedTuple):
    """Rows to which cross-attention attends.

    Attributes:
        rows: [l, b, h].
        length: the first so many rows are real, the others padding.
    """

    rows: Tensor
    length: int


class Conditioning(NamedTuple):
    """Inputs of every layer beside the tokens.

    Attributes:
        timestep: embedding [b, h], fp32; the head's.
        modulation: projected embedding [b, 6, h], fp32; the layers'.
        text: l rows, or None without text attention.
        image: n rows, or None without image attention.
    """

    timestep: Tensor
    modulation: Tensor
    text: Context | None
    image: Context | None


class TimestepEmbedder(nn.Module):
    """Sinusoid, then two linear layers; all fp32: in bf16 timesteps near 1000 are 4 apart."""

    def __init__(self, freq_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = nn.Linear(freq_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(timesteps, self.freq_dim))))  # (b) -> (b, h)


class TextEmbedder(nn.Module):
    """Text encoder's width to the token stream's. [b, l, e] -> [b, l, h]"""

    def __init__(self, text_embed_dim: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_embed_dim, hidden_size, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class ImageEmbedder(nn.Module):
    """Image encoder's width to the token stream's, normed on both sides (eps 1e-5, as Wan). [b, n, e] -> [b, n, h]"""

    def __init__(self, image_embed_dim: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_embed_dim, dtype=dtype)
        self.linear_1 = nn.Linear(image_embed_dim, image_embed_dim, dtype=dtype)
        self.linear_2 = nn.Linear(image_embed_dim, hidden_size, dtype=dtype)
        self.norm2 = nn.LayerNorm(hidden_size, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm2(self.linear_2(F.gelu(self.linear_1(self.norm1(image)))))


class ConditionEmbedder(nn.Module):
    """Every pipeline stage has a copy, so that no condition travels between stages.

    Args:
        token_multiple: text and image are padded to a multiple of so many rows.
    """

    def __init__(self, config: DiTConfig, dtype: torch.dtype, token_multiple: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.dtype = dtype
        self.token_multiple = token_multiple
        self.time_embedder = TimestepEmbedder(config.freq_dim, hidden_size)
        self.time_proj = nn.Linear(hidden_size, NUM_MODULATIONS * hidden_size)
        self.text_embedder = TextEmbedder(config.text_embed_dim, hidden_size, dtype) if config.text_embed_dim else None
        self.image_embedder = (
            ImageEmbedder(config.image_embed_dim, hidden_size, dtype) if config.image_embed_dim else None
        )

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding [b, h] and modulation [b, 6, h] of timesteps [b], all fp32."""
        timestep = self.time_embedder(timesteps)
        return timestep, self.time_proj(F.silu(timestep)).unflatten(1, (NUM_MODULATIONS, -1))

    def embed_contexts(self, text: Tensor | None, image: Tensor | None) -> tuple[Context | None, Context | None]:
        """Rows to attend to from text [b, l, e] and image [b, n, e]; None where the model attends to none.

        Raises:
            ValueError: text or image is missing where the model attends to it.
        """
        return self._embed(self.text_embedder, text, "text"), self._embed(self.image_embedder, image, "image")

    def _embed(self, embedder: nn.Module | None, features: Tensor | None, name: str) -> Context | None:
        if embedder is None:
            return None
        if features is None:
            raise ValueError(f"this model attends to {name} features, and none were given")
        rows = embedder(features.to(self.dtype)).transpose(0, 1)  # (b, l, e) -> (l, b, h)
        return Context(append_rows(rows, round_up(len(rows), self.token_multiple)), len(rows))


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines [b, dim] of timesteps [b] at dim / 2 frequencies from 1 down to 1e-4, fp32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
