"""Encoding large frames in training with the memory of a tile, exactly.

The encoder's outer stages, before the latents' frame rate, need nearly all its memory. They have no attention, so they
can run on tiles of the frame with a margin as wide as their convolutions reach, each computed again in the backward
pass. Nothing but pixels is kept from tile to tile; slices in time (sliced_encoder.py) keep the last input frames of
every convolution, which at 1024 x 1024 are 4 GB a slice.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import TEMPORAL_STAGES, is_residual_stage
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.streaming import Stream

CELL = 2**TEMPORAL_STAGES
"""Pixels per side of a position of the outer stages' output."""


def tile_halo(config: FSAEConfig) -> int:
    """Cells of CELL pixels next to a cut that the padding there reaches, exactly: 4 with the paper's sizes.

    Raises:
        ValueError: an outer stage has attention, which sees the whole frame.
    """
    first = 0 if config.encoder_depths[0] else 1
    if not all(is_residual_stage(config, stage) for stage in range(first, TEMPORAL_STAGES)):
        raise ValueError(
            f"the {TEMPORAL_STAGES} outer stages must be residual ones to encode tiles: attention_stages "
            f"{config.attention_stages} of {len(config.widths)} stages reach into them"
        )
    reach = 1  # of the stem, in positions of its own resolution
    for stage in range(first, TEMPORAL_STAGES):
        reach = (reach + 2 * config.encoder_depths[stage]) // 2 + 1
    return reach


def encode_tiled(fsae: FSAE, video: Tensor, tile: int, shards: Stream | None = None) -> Tensor:
    """Encode a video with the result and gradients of `FSAE.encode`, but the memory of a tile.

    It costs one more forward pass of the outer stages and their margins.

    Args:
        tile: side of a tile without its margin, in pixels.
        shards: how this process's frames are joined to the others' (`FrameShards`); `video` then has only these frames.

    Raises:
        ValueError: a size that `FSAE.encode` refuses; a tile that is no positive multiple of CELL; outer stages with
            attention.
    """
    if shards is None:
        fsae.check_whole_video(video)
    if tile < 1 or tile % CELL:
        raise ValueError(f"a tile of {tile} pixels: its side must be a positive multiple of {CELL}")
    halo, side = tile_halo(fsae.config), tile // CELL
    height, width = video.shape[3] // CELL, video.shape[4] // CELL

    def encode_tile(crop: Tensor) -> Tensor:
        return fsae.encoder.outer(crop, shards)

    rows = []
    for top in range(0, height, side):
        row = []
        for left in range(0, width, side):
            (above, below, y), (before, after, x) = _widened(top, side, height, halo), _widened(left, side, width, halo)
            crop = video[..., above * CELL : below * CELL, before * CELL : after * CELL]
            row.append(checkpoint(encode_tile, crop, use_reentrant=False)[..., y, x])
        rows.append(torch.cat(row, dim=-1))
    return fsae.encoder.inner(torch.cat(rows, dim=-2), shards)


def _widened(start: int, side: int, length: int, halo: int) -> tuple[int, int, slice]:
    """(first, last + 1) cell of a tile with its margins, and where the tile lies in it."""
    stop = min(start + side, length)
    first, last = max(0, start - halo), min(length, stop + halo)
    return first, last, slice(start - first, stop - first)
