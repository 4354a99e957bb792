"""Videos of any length and size through an autoencoder, in tiles (paper sections 2.2.1, 2.2.3).

Time: the encoder, and causal and Lite decoders, go through a video in slices with the result of one call. A Standard
decoder sees both ways, so its temporal tiles overlap and are blended. Space: attention sees whole frames, so spatial
tiles are an approximation for every kind; they are blended and off unless asked for.

Blending: each tile is weighted by a ramp over its overlap, and the weights of a position sum to 1. They are products of
weights per axis, so nothing but finished frames and one overlap is kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.models.fsae.context import DecodeContext, Window
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.streaming import Stream, StreamCache

Progress = Callable[[int, int | None], None]
"""Called with (tiles done, tiles in all), or None for all while the end of the video is not known."""


@dataclass(frozen=True)
class Tiling:
    """Sizes in latents.

    Attributes:
        frames: latent frames per slice or tile.
        overlap_frames: latent frames that two tiles of a Standard decoder share.
        rows, columns: of a spatial tile; None decodes whole frames.
        overlap: rows and columns that two spatial tiles share.

    Raises:
        ValueError: an overlap of more than half a tile.
    """

    frames: int = 16
    overlap_frames: int = 4
    rows: int | None = None
    columns: int | None = None
    overlap: int = 2

    def __post_init__(self) -> None:
        sizes = [("frames", self.frames, self.overlap_frames)]
        sizes += [(name, side, self.overlap) for name, side in (("rows", self.rows), ("columns", self.columns)) if side]
        for name, size, overlap in sizes:
            if not 0 <= 2 * overlap <= size or size < 1:
                raise ValueError(f"tiles of {size} {name} cannot overlap by {overlap}: give at most half")


@dataclass(frozen=True)
class AxisTile:
    """Latents start .. stop of an axis, and the tile's weight at each pixel or frame that they make."""

    start: int
    stop: int
    weights: Tensor


def axis_tiles(
    length: int, size: int | None, overlap: int, span: Callable[[int, int], tuple[int, int]]
) -> list[AxisTile]:
    """Tiles that cover an axis; the last one is moved back to end with it, where it overlaps more.

    Args:
        length: of the axis, in latents.
        size: of a tile; None, or at least `length`, makes one tile.
        overlap: at least this many latents are shared by neighbours.
        span: (start, stop) in latents -> (start, stop) of the outputs they make.
    """
    if size is None or size >= length:
        starts, size = [0], length
    else:
        starts = [*range(0, length - size, size - overlap), length - size]
    spans = [span(start, start + size) for start in starts]
    total = torch.zeros(spans[-1][1], dtype=torch.float64)
    ramps = []
    for k, (first, last) in enumerate(spans):
        # 1 inside; towards a neighbour it falls over what both share.
        distance = torch.arange(last - first, dtype=torch.float64) + 0.5
        ramp = torch.ones_like(distance)
        if k > 0:
            ramp = torch.minimum(ramp, distance / (spans[k - 1][1] - first + 1e-9))
        if k + 1 < len(spans):
            ramp = torch.minimum(ramp, distance.flip(0) / (last - spans[k + 1][0] + 1e-9))
        total[first:last] += ramp
        ramps.append(ramp)
    return [
        AxisTile(start, start + size, ramp / total[first:last])
        for start, (first, last), ramp in zip(starts, spans, ramps, strict=True)
    ]


def frame_span(start: int, stop: int) -> tuple[int, int]:
    """Video frames of latents start .. stop: latent 0 is frame 0, latent i is frames 4i-3 .. 4i."""
    return max(0, 4 * start - 3), 4 * stop - 3


def encode_frames(
    fsae: FSAE, frames: Iterable[Tensor], tiling: Tiling | None = None, progress: Progress | None = None
) -> Iterator[Tensor]:
    """Encode a video that comes in chunks [b, 3, f, h, w] of any number of frames, with the memory of a slice.

    The last frame is repeated until the video has 4k+1 frames. Yields latents [b, c, n, h', w'] in order.
    """
    tiling = tiling or Tiling()
    caches: list[StreamCache] = []
    done = 0
    for chunk in _slices(frames, tiling.frames * fsae.temporal_factor, fsae.temporal_factor):
        rows, columns = _spatial_tiles(chunk.shape[-2:], tiling, fsae.spatial_factor, 1)
        caches = caches or [StreamCache() for _ in range(len(rows) * len(columns))]
        latents = None
        for k, (row, column) in enumerate((row, column) for row in rows for column in columns):
            factor = fsae.spatial_factor
            tile = chunk[..., row.start * factor : row.stop * factor, column.start * factor : column.stop * factor]
            part = fsae.encode_chunk(tile, caches[k])
            if latents is None:
                size = [side // factor for side in chunk.shape[-2:]]
                latents = part.new_zeros(*part.shape[:3], *size)
            latents[..., row.start : row.stop, column.start : column.stop] += _weighted(part, row, column)
            done += 1
            if progress is not None:
                progress(done, None)
        yield latents


def decode_frames(
    fsae: FSAE,
    latents: Iterable[Tensor],
    first_frame_features: Sequence[Tensor] | None = None,
    noise_seed: int = 0,
    tiling: Tiling | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Decode latents that come in chunks [b, c, n, h, w], and yield finished frames [b, 3, f, H, W] in order.

    A causal or Lite decoder needs the memory of one slice; a Standard decoder that of a tile, and all latents.
    """
    tiling = tiling or Tiling()
    if not fsae.decoder.streams:
        yield from _decode_blended(
            fsae, torch.cat(list(latents), dim=2), first_frame_features, noise_seed, tiling, progress
        )
        return
    caches: list[StreamCache] = []
    done = 0
    for given in latents:
        for chunk in given.split(tiling.frames, dim=2):
            rows, columns = _spatial_tiles(chunk.shape[-2:], tiling, 1, fsae.spatial_factor)
            caches = caches or [StreamCache() for _ in range(len(rows) * len(columns))]
            yield _decode_slice(fsae, chunk, (rows, columns), caches, first_frame_features, noise_seed)
            for cache in caches:
                cache.position += chunk.shape[2]
            done += len(caches)
            if progress is not None:
                progress(done, None)


def _decode_blended(
    fsae: FSAE,
    latents: Tensor,
    features: Sequence[Tensor] | None,
    noise_seed: int,
    tiling: Tiling,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """Temporal tiles of a Standard decoder: a tile's last frames wait until the next one has been added to them."""
    times = axis_tiles(latents.shape[2], tiling.frames, tiling.overlap_frames, frame_span)
    spatial = _spatial_tiles(latents.shape[-2:], tiling, 1, fsae.spatial_factor)
    count = len(spatial[0]) * len(spatial[1])
    waiting, finished = None, 0  # blended frames from number `finished` on
    for k, time in enumerate(times):
        streams = [Stream(time.start) for _ in range(count)]
        video = _decode_slice(fsae, latents[:, :, time.start : time.stop], spatial, streams, features, noise_seed)
        video = video * time.weights.to(video).view(-1, 1, 1)
        first, last = frame_span(time.start, time.stop)
        if waiting is None:
            waiting = video
        else:
            waiting = F.pad(waiting, (0, 0, 0, 0, 0, last - finished - waiting.shape[2]))
            waiting[:, :, first - finished :] += video
        until = frame_span(times[k + 1].start, times[k + 1].stop)[0] if k + 1 < len(times) else last
        if progress is not None:
            progress((k + 1) * count, len(times) * count)
        yield waiting[:, :, : until - finished].clone()
        waiting, finished = waiting[:, :, until - finished :], until


def _decode_slice(
    fsae: FSAE,
    latents: Tensor,
    spatial: tuple[list[AxisTile], list[AxisTile]],
    streams: Sequence[Stream],
    features: Sequence[Tensor] | None,
    noise_seed: int,
) -> Tensor:
    """Some latent frames [b, c, n, h, w], each spatial tile with its own stream, blended to whole video frames."""
    height, width = latents.shape[-2:]
    video, factor = None, fsae.spatial_factor
    for stream, (row, column) in zip(streams, ((r, c) for r in spatial[0] for c in spatial[1]), strict=True):
        window = Window(row.start, column.start, height, width)
        context = DecodeContext(stream, features, window, noise_seed)
        part = fsae.decoder(latents[..., row.start : row.stop, column.start : column.stop], context)
        if len(streams) == 1:
            return part
        if video is None:
            video = part.new_zeros(*part.shape[:3], height * factor, width * factor)
        place = (..., slice(row.start * factor, row.stop * factor), slice(column.start * factor, column.stop * factor))
        video[place] += _weighted(part, row, column)
    assert video is not None
    return video


def pad_to_grid(video: Tensor, factor: int) -> Tensor:
    """Repeat the last row and column [..., h, w] until both sides are multiples of `factor`; crop after decoding."""
    height, width = video.shape[-2:]
    bottom, right = -height % factor, -width % factor
    if not bottom and not right:
        return video
    flat = video.flatten(0, -4)
    return F.pad(flat, (0, right, 0, bottom, 0, 0), mode="replicate").unflatten(0, video.shape[:-3])


def _spatial_tiles(size: Sequence[int], tiling: Tiling, given: int, made: int) -> tuple[list[AxisTile], list[AxisTile]]:
    """Rows and columns of tiles for a map of which `given` positions are a latent, and which makes `made` of each."""
    axes = [
        axis_tiles(side // given, tile, tiling.overlap, lambda start, stop: (start * made, stop * made))
        for side, tile in zip(size, (tiling.rows, tiling.columns), strict=True)
    ]
    return axes[0], axes[1]


def _weighted(part: Tensor, row: AxisTile, column: AxisTile) -> Tensor:
    return part * (row.weights[:, None] * column.weights[None, :]).to(part)


def _slices(chunks: Iterable[Tensor], size: int, factor: int) -> Iterator[Tensor]:
    """Frames in chunks of any length -> 1 frame, then `size` frames each, the last with as few as end on a latent."""
    waiting: list[Tensor] = []
    held, wanted = 0, 1
    for chunk in chunks:
        waiting.append(chunk)
        held += chunk.shape[2]
        while held >= wanted:
            joined = torch.cat(waiting, dim=2)
            yield joined[:, :, :wanted]
            waiting, held, wanted = [joined[:, :, wanted:]], held - wanted, size
    if not held:
        return
    rest = torch.cat(waiting, dim=2)
    missing = math.ceil(held / factor) * factor - held
    yield torch.cat([rest, rest[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
