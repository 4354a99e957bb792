"""Rotary position embedding over (t, h, w), as Wan has it: interleaved pairs, one spectrum per axis.

Of a head's d channels, rows and columns get 2 * (d // 6) each and time the rest: 44, 42, 42 of 128.
"""

import torch
from torch import Tensor

from megatron_fsvideo.models.dit.tokens import Grid

Rotary = tuple[Tensor, Tensor]


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with the frame, the row and the column."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_tables(grid: Grid, head_dim: int, base: float, scale_hw: float, device: torch.device) -> Rotary:
    """cos and sin [n, head_dim / 2], fp32, of the angles of all tokens of a grid (angles in fp64)."""
    scales = (1.0, scale_hw, scale_hw)
    angles = [
        _axis_angles(size, dim, base, scale, device)
        for size, dim, scale in zip(grid, axis_dims(head_dim), scales, strict=True)
    ]
    t, h, w = grid
    every = torch.cat(
        [
            angles[0].view(t, 1, 1, -1).expand(t, h, w, -1),
            angles[1].view(1, h, 1, -1).expand(t, h, w, -1),
            angles[2].view(1, 1, w, -1).expand(t, h, w, -1),
        ],
        dim=-1,
    ).reshape(t * h * w, head_dim // 2)
    return every.cos().float(), every.sin().float()


def apply_rotary(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of neighbouring channels of [s, b, n, d] by its token's angles."""
    cos, sin = (table.view(-1, 1, 1, table.shape[-1]) for table in rotary)  # (s, 1, 1, d/2)
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(heads.dtype)


def _axis_angles(size: int, dim: int, base: float, scale: float, device: torch.device) -> Tensor:
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    return torch.outer(torch.arange(size, dtype=torch.float64, device=device) / scale, frequencies)
