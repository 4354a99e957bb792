"""Intrinsic dimension of an autoencoder's latents, as Table 1 of the paper reports it (docs/evaluation.md).

    torchrun --nproc-per-node 8 tools/intrinsic_dimension.py --load runs/fsae_phase4 --video-dir videos \
        --out table1.json

    python tools/intrinsic_dimension.py --latents data/latents --bucket 17x256x256

Gride with 2, 4, ..., 64 neighbours (evaluation/gride.py); one point is one clip's latents. Lower is simpler. From
videos: a line for clips and one for images. The relative standard error at the finest scale is 1 / sqrt(points).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from megatron_fsvideo.config import VideoDataConfig, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fsvideo.models.codecs import FSAECodec
    from megatron_fsvideo.parallel.team import Team


@dataclass(frozen=True)
class DimensionFlags(Checked):
    """what to measure"""

    load: PathText | None = None
    """Autoencoder: a release folder, or a --save folder of pretrain_fsae.py. Needs --video-dir."""
    video_dir: PathText | None = None
    """Folder of video files."""
    latents: tuple[PathText, ...] = ()
    """Latents, instead of --load and --video-dir: .npy or .safetensors files with one point per row, or latent dataset
    folders."""
    bucket: PathText | None = None
    """Clip shape to use of a latent dataset with several, such as 17x256x256."""
    out: PathText | None = None
    """JSON file to write."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""
    num_points: Annotated[int, Meta(ge=2)] = 5000
    """Number of clips or samples, spread evenly."""
    max_neighbors: Annotated[int, Meta(ge=2)] = 64
    """Largest number of neighbours, a power of two. Scales begin at 2 neighbours."""


@dataclass(frozen=True)
class ClipFlags(Checked):
    """which clips of the videos are encoded"""

    num_frames: tuple[PositiveInt, ...] = (17, 1)
    """Frames per clip. Each number gives one line of output."""
    resolution: PositiveInt = 256
    """Side of the centre crops in pixels."""
    short_side: PositiveInt = 256
    """Short side in pixels to which videos are resized."""
    sampling: Literal["shots", "videos"] = "shots"
    """shots: clips lie within shots. videos: each video is one clip, from its beginning."""
    device: PathText | None = None
    """Device, such as cpu or cuda. None takes the GPU of this process, if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the autoencoder."""


@dataclass(frozen=True)
class DimensionJob:
    """Measure the intrinsic dimension of latents."""

    dimension: DimensionFlags
    clips: ClipFlags = field(default_factory=ClipFlags)


def run(job: DimensionJob) -> None:
    """Encode clips or read latents, estimate, and write the report."""
    from megatron_fsvideo.parallel.team import join_team, leave_team

    flags, team = job.dimension, join_team()
    from_videos = flags.load is not None and flags.video_dir is not None
    if from_videos == bool(flags.latents) or (flags.load is None) != (flags.video_dir is None):
        raise ValueError("give --load and --video-dir, or --latents")
    check_outputs([flags.out] if flags.out else [], flags.latents, overwrite=flags.overwrite)
    lines = []
    for name, points, skipped in encoded(job, team) if from_videos else stored(flags, team):
        if team.leads:
            lines.append(estimate(name, points, skipped, flags.max_neighbors))
            print(lines[-1].pop("line"), flush=True)
    if team.leads and flags.out is not None:
        write_json(flags.out, lines)
    leave_team(team)


def main() -> None:
    """Parse the command line and measure."""
    run(parse_job(DimensionJob))


def encoded(job: DimensionJob, team: Team) -> Iterator[tuple[str, Tensor, dict[str, str]]]:
    """Encode and return (name, points, skipped clips) for each length of clips."""
    from megatron_fsvideo.checkpoint.release import load_fsae
    from megatron_fsvideo.evaluation.autoencoders import Facts
    from megatron_fsvideo.models.codecs import FSAECodec
    from megatron_fsvideo.parallel.dtypes import DTYPES

    clips, device = job.clips, team.device(job.clips.device)
    assert job.dimension.load is not None
    codec = FSAECodec(load_fsae(job.dimension.load, device, DTYPES[clips.dtype]))
    facts = Facts(job.dimension.load, codec.compression.spatial, codec.compression.temporal, codec.latent_channels)
    # Check all lengths before the first is encoded.
    for num_frames in clips.num_frames:
        facts.check_clip(num_frames, clips.resolution)
    for num_frames in clips.num_frames:
        yield of_length(codec, num_frames, job, team)


def of_length(codec: FSAECodec, num_frames: int, job: DimensionJob, team: Team) -> tuple[str, Tensor, dict[str, str]]:
    """Return (name, points, skipped files and clips) of clips of one length."""
    from megatron_fsvideo.evaluation.clips import list_clips
    from megatron_fsvideo.evaluation.gride import check_number
    from megatron_fsvideo.evaluation.latent_points import encode_clips

    clips = job.clips
    data = VideoDataConfig(
        video_dir=job.dimension.video_dir,
        num_frames=num_frames,
        resolution=clips.resolution,
        short_side=clips.short_side,
    )
    listed = list_clips(data, clips.sampling, job.dimension.num_points, team)
    check_number(len(listed.clips), job.dimension.max_neighbors)
    points, skipped = encode_clips(codec, listed.clips, data, team, listed.index)
    return "image" if num_frames == 1 else f"video, {num_frames} frames", points, listed.skipped | skipped


def stored(flags: DimensionFlags, team: Team) -> Iterator[tuple[str, Tensor, dict[str, str]]]:
    """Read and return (path, points, nothing skipped). One process reads, because reading is quick."""
    from megatron_fsvideo.evaluation.latent_points import read_points

    for path in flags.latents if team.leads else ():
        yield path, read_points(path, flags.bucket, flags.num_points), {}


def estimate(name: str, points: Tensor, skipped: dict[str, str], max_neighbors: int) -> dict[str, Any]:
    """Estimate for a set of points: its entry in the JSON, and the line to print."""
    from megatron_fsvideo.evaluation.gride import drop_duplicates, intrinsic_dimension, table_row

    for clip, reason in skipped.items():
        print(f"skipped {clip}: {reason}", file=sys.stderr, flush=True)
    distinct = drop_duplicates(points)
    if len(distinct) < len(points):
        print(f"{name}: {len(points) - len(distinct)} duplicate points dropped", file=sys.stderr, flush=True)
    estimates = intrinsic_dimension(distinct, max_neighbors)
    return {
        "line": table_row(f"{name}, {len(distinct)} points", estimates),
        "name": name,
        "points": len(distinct),
        "features": points.shape[1],
        "duplicates": len(points) - len(distinct),
        "skipped": skipped,
        "scales": [asdict(scale) for scale in estimates],
    }


if __name__ == "__main__":
    run_script(main)
