"""Decoding a patch for training (paper section 2.2.1 "we randomly extract a small 3D patch").

The inner decoder runs on everything; its features are cut to a box, and only the box goes through the three outer
stages, which need nearly all the memory. At edges that are no borders of the frame the convolutions' padding is wrong:
only the part that it does not reach is returned (footnote 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import TEMPORAL_STAGES, is_residual_stage
from megatron_fsvideo.models.fsae.context import DecodeContext, NoiseSeed, Window
from megatron_fsvideo.models.fsae.decoder import OUTER_STAGES
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.streaming import Stream
from megatron_fsvideo.models.fsae.tiling import frame_span

WARM_UP_LATENTS = 2
"""Latents at a cut in time that are computed and not used. Exactness would need 27 (the paper's sizes)."""


@dataclass(frozen=True)
class PatchBox:
    """Latents start .. stop and cells top .. bottom, left .. right; a cell is a position of the outer stages' input.

    With three outer stages a cell has 8 x 8 pixels.
    """

    start: int
    stop: int
    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class VideoRegion:
    """A box of a video, in frames and pixels."""

    frames: slice
    rows: slice
    columns: slice

    def of(self, video: Tensor) -> Tensor:
        """Cut this box out of a video [b, c, f, h, w]."""
        return video[:, :, self.frames, self.rows, self.columns]


def cell_size(config: FSAEConfig) -> int:
    """Pixels per side of a cell."""
    return 2 ** min(OUTER_STAGES, len(config.widths) - 1)


def patch_halo(config: FSAEConfig) -> int:
    """Cells next to a cut that the padding there reaches, exactly: 7 with the paper's sizes (8 all sub-pixel).

    Raises:
        ValueError: an outer stage has attention, which sees the whole frame.
    """
    outer = min(OUTER_STAGES, len(config.widths) - 1)
    last = 0 if config.decoder_depths[0] else 1
    if not all(is_residual_stage(config, stage) for stage in range(last, outer)):
        raise ValueError(
            f"the {outer} outer stages must be residual ones to decode a patch alone: attention_stages "
            f"{config.attention_stages} of {len(config.widths)} stages reach into them"
        )
    reach = 1  # of the head, in positions of its own resolution
    for stage in range(last, outer):
        reach += 2 * config.decoder_depths[stage]
        if stage < TEMPORAL_STAGES or config.upsampling == "sub-pixel":
            reach = -(-reach // 2) + 1
        else:
            reach = -(-(reach + 1) // 2)
    return reach


def draw_box(
    generator: torch.Generator, config: FSAEConfig, latents: Sequence[int], size: tuple[int, int, int]
) -> PatchBox:
    """A box at a random place.

    Args:
        latents: shape [b, c, t, h, w] of the latents.
        size: latents, rows and columns of cells; larger ones are cut to what is there.
    """
    cells = config.spatial_factor // cell_size(config)
    whole = (latents[2], latents[3] * cells, latents[4] * cells)
    bounds = []
    for length, wanted in zip(whole, size, strict=True):
        taken = min(length, wanted)
        start = int(torch.randint(length - taken + 1, (), generator=generator))
        bounds += [start, start + taken]
    return PatchBox(*bounds)


def decode_patch(
    fsae: FSAE,
    latents: Tensor,
    box: PatchBox,
    first_frame_features: Sequence[Tensor] | None = None,
    noise_seed: NoiseSeed = 0,
    shards: Stream | None = None,
) -> tuple[Tensor, VideoRegion]:
    """Decode what can be decoded right from a box, with gradients to all of the latents.

    In space the result is exactly that of `FSAE.decode` there. In time it is if the box begins with the video, for a
    Standard decoder if it also ends with it; other ends are cut by `WARM_UP_LATENTS` and nearly right.

    Args:
        shards: how `latents`, this process's part of a video, is joined to the others' (`FrameShards`): then the box
            has all of them and the result is exact in time too. The box and the region count in this process's part.

    Returns:
        (pixels [b, 3, f, h, w], the region of the video that they are: compare with `region.of(video)`).

    Raises:
        ValueError: a box outside of the frame, or so small that nothing of it is right; with `shards`, one that cuts
            time.
    """
    config, halo, cell = fsae.config, patch_halo(fsae.config), cell_size(fsae.config)
    h, window = fsae.decoder.inner(latents, DecodeContext(shards, first_frame_features, None, noise_seed))
    num_latents, frame = latents.shape[2], (window.frame_height, window.frame_width)
    if shards is not None and (box.start, box.stop) != (0, num_latents):
        raise ValueError(f"latents {box.start} to {box.stop} of {num_latents}: a video on several processes is whole")
    time = _valid("latents", box.start, box.stop, num_latents, WARM_UP_LATENTS, cut_at_end=config.decoder == "standard")
    rows = _valid("rows of cells", box.top, box.bottom, frame[0], halo)
    columns = _valid("columns of cells", box.left, box.right, frame[1], halo)

    stream = Stream(box.start) if shards is None else shards
    context = DecodeContext(stream, first_frame_features, None, noise_seed)
    crop = h[:, :, box.start : box.stop, box.top : box.bottom, box.left : box.right]
    video = fsae.decoder.outer(crop, Window(box.top, box.left, *frame), context)
    region = VideoRegion(
        slice(*frame_span(*time)) if shards is None else slice(0, video.shape[2]),
        slice(rows[0] * cell, rows[1] * cell),
        slice(columns[0] * cell, columns[1] * cell),
    )
    begin = (frame_span(box.start, box.stop)[0], box.top * cell, box.left * cell)
    inside = VideoRegion(
        *(_shifted(s, -b) for s, b in zip((region.frames, region.rows, region.columns), begin, strict=True))
    )
    return inside.of(video), region


def _valid(what: str, start: int, stop: int, length: int, trim: int, cut_at_end: bool = True) -> tuple[int, int]:
    """The part of start .. stop that a cut does not reach."""
    if not 0 <= start < stop <= length:
        raise ValueError(f"{what} {start} to {stop} are not inside the {length} of the whole")
    first = start if start == 0 else start + trim
    last = stop if stop == length or not cut_at_end else stop - trim
    if first >= last:
        raise ValueError(
            f"{what} {start} to {stop} of {length}: {trim} next to each cut are wrong, so nothing is left; take more"
        )
    return first, last


def _shifted(box: slice, by: int) -> slice:
    return slice(box.start + by, box.stop + by)
