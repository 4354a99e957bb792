"""Encode a video and decode it again, to show what an autoencoder keeps.

    python tools/reconstruct.py IN.mp4 OUT.mp4 --load runs/fsae --side-by-side

Videos of any length: a causal or Lite decoder needs the memory of one slice; a Standard decoder blends tiles and keeps
the latents. Videos of any size: the last row and column are repeated up to the autoencoder's grid and cropped again
(up to even sides, without which H.264 players show nothing).
Prints the mean PSNR of the frames.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, Positive, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from megatron_fsvideo.data.video import FrameTable
    from megatron_fsvideo.models.codecs import FSAECodec

USAGE = "usage: reconstruct.py IN.mp4 OUT.mp4 [--load RELEASE] [--side-by-side] ... (--help lists the flags)"


@dataclass(frozen=True)
class ReconstructFlags(Checked):
    """with what, and how"""

    load: PathText = "runs/fsae"
    """Autoencoder: a release folder, or a --save folder of pretrain_fsae.py."""
    side_by_side: bool = False
    """Show the original to the left of the reconstruction."""
    overwrite: bool = False
    """Replace OUT.mp4 of an earlier run."""
    first_frame: bool = True
    """Give a Standard or Lite decoder the first frame's features, as image-to-video generation does."""
    noise_seed: Count = 0
    """Seed of the noise of a Standard or Lite decoder."""
    fps: Positive | None = None
    """Frames per second: the frames nearest in time are taken. None takes every frame, at the mean rate of the file."""
    quality: Annotated[int, Meta(ge=0, le=51)] = 18
    """Constant rate factor of x264: 0 is lossless, 28 gives small files."""
    device: PathText = "cpu"
    """Device, such as cpu or cuda."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation."""


@dataclass(frozen=True)
class TilingFlags(Checked):
    """memory: sizes in latents"""

    slice_frames: PositiveInt = 4
    """Latent frames that are processed at a time. A Standard decoder blends tiles of this length."""
    overlap_frames: Count = 1
    """Latent frames that two neighbouring tiles of a Standard decoder share."""
    tile_rows: PositiveInt | None = None
    """Latent rows of a spatial tile. None takes whole frames. Tiles are an approximation."""
    tile_columns: PositiveInt | None = None
    """Latent columns of a spatial tile. None takes whole frames."""
    tile_overlap: Count = 2
    """Latent rows and columns that two neighbouring tiles share."""


@dataclass(frozen=True)
class ReconstructJob:
    """Encode a video and decode it again."""

    reconstruct: ReconstructFlags
    tiling: TilingFlags = field(default_factory=TilingFlags)


def main() -> None:
    """Parse the command line, reconstruct and write."""
    arguments = sys.argv[1:]
    paths = list(islice((a for a in arguments if not a.startswith("-")), 2))
    if "--help" not in arguments and (len(paths) < 2 or arguments[:2] != paths):
        raise ValueError(USAGE)
    job = parse_job(ReconstructJob, argv=arguments[2:] if paths else arguments)
    check_outputs([paths[1]], [paths[0]], overwrite=job.reconstruct.overwrite)
    run(job, paths[0], paths[1])


def run(job: ReconstructJob, source: str, target: str) -> None:
    """Reconstruct and write."""
    import torch

    from megatron_fsvideo.checkpoint.release import load_fsae
    from megatron_fsvideo.models.codecs import FSAECodec
    from megatron_fsvideo.models.fsae.tiling import Tiling

    flags, tiling = job.reconstruct, job.tiling
    dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
    fsae = load_fsae(flags.load, flags.device, dtype)
    # Slices of a streaming decoder do not overlap, and may have one latent frame.
    overlap = 0 if fsae.decoder.streams else tiling.overlap_frames
    tiles = Tiling(tiling.slice_frames, overlap, tiling.tile_rows, tiling.tile_columns, tiling.tile_overlap)
    psnr = reconstruct(FSAECodec(fsae, tiling=tiles), source, target, flags)
    print(f"{target}: PSNR {psnr:.2f} dB in the mean of its frames")


def reconstruct(codec: FSAECodec, source: str, target: str, flags: ReconstructFlags) -> float:
    """Write the reconstruction of a file; returns the mean PSNR in dB.

    Raises:
        ValueError: the file is damaged, or the fps of the flags is not positive.
    """
    import numpy as np
    import torch

    from megatron_fsvideo.data.video import measure, write_frames

    if flags.fps is not None and flags.fps <= 0:
        raise ValueError(f"fps must be positive, got {flags.fps}")
    table = measure(source)
    info, timeline = table.info, table.timeline
    fps = flags.fps or info.fps
    evenly = flags.fps is None and timeline.seconds is None
    numbers = list(range(info.num_frames)) if evenly else timeline.clip_indices(0, None, fps)
    psnrs: list[float] = []
    frames = _reconstructed(codec, partial(_frames, source, table, numbers), len(numbers), flags, psnrs)
    width = info.width * (2 if flags.side_by_side else 1)
    # H.264 stores colour at half resolution.
    size = (info.height + info.height % 2, width + width % 2)
    with torch.no_grad():
        write_frames(target, (_padded(frame, 2) for frame in frames), size, fps, flags.quality)
    return float(np.mean(psnrs))


def _reconstructed(
    codec: FSAECodec,
    source: Callable[[], Iterator[np.ndarray]],
    count: int,
    flags: ReconstructFlags,
    psnrs: list[float],
) -> Iterator[Tensor]:
    """Frames uint8 [h, w or 2 w, 3] of the video to write; appends the PSNR of each to `psnrs`.

    Args:
        source: starts a pass over the `count` frames to reconstruct.
    """
    import torch
    from tqdm import tqdm

    from megatron_fsvideo.data.video import from_unit, to_unit
    from megatron_fsvideo.evaluation.psnr import psnr_per_frame
    from megatron_fsvideo.models.fsae.tiling import decode_frames

    factor = codec.compression.spatial
    latents = codec.encode_stream(_chunks(source(), codec.compression.temporal, factor))
    if flags.first_frame:
        decoded = codec.decode_stream(latents, next(_chunks(source(), 1, factor)), flags.noise_seed)
    else:
        decoded = decode_frames(codec.fsae, latents, None, flags.noise_seed, codec.tiling)
    originals = source()
    # The last latent may decode to more frames than the video has.
    with tqdm(total=count, unit="frame", delay=2, disable=None) as bar:
        for chunk in decoded:
            for frame in from_unit(chunk[0].clamp(-1, 1)):
                original = next(originals, None)
                if original is None:
                    return
                expected = torch.from_numpy(original)
                frame = frame[: expected.shape[0], : expected.shape[1]].cpu()
                psnrs.append(float(psnr_per_frame(to_unit(frame[None])[None], to_unit(expected[None])[None])))
                yield torch.cat([expected, frame], dim=1) if flags.side_by_side else frame
                bar.update()


def _chunks(frames: Iterator[np.ndarray], size: int, factor: int) -> Iterator[Tensor]:
    """Cut the frames into [1, 3, size or fewer, h, w] in [-1, 1], with sides padded to multiples of `factor`."""
    import numpy as np
    import torch

    from megatron_fsvideo.data.video import to_unit
    from megatron_fsvideo.models.fsae.tiling import pad_to_grid

    while taken := list(islice(frames, size)):
        video = to_unit(torch.from_numpy(np.stack(taken))).unsqueeze(0)
        yield pad_to_grid(video, factor)


def _padded(frame: Tensor, factor: int) -> Tensor:
    """Pad an image [h, w, 3] to multiples of `factor` by repeating its last row and column."""
    from megatron_fsvideo.models.fsae.tiling import pad_to_grid

    return pad_to_grid(frame.movedim(-1, 0)[:, None], factor)[:, 0].movedim(0, -1)


def _frames(source: str, table: FrameTable, numbers: list[int]) -> Iterator[np.ndarray]:
    """Yield each numbered frame of the file, as often as its number occurs."""
    from megatron_fsvideo.data.video import VideoReader

    with VideoReader(source, table) as reader:
        yield from reader.frames(numbers, allow_damaged=True)


if __name__ == "__main__":
    run_script(main)
