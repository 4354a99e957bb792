"""Judge an autoencoder by its reconstructions of held-out shots.

    python tools/evaluate_fsae.py --load runs/fsae --video-dir videos --out runs/fsae-evaluation/evaluation.json

Writes the JSON (PSNR, SSIM, PSNR of the first and last frame, in the mean and of each clip) and beside it a PNG of
originals and reconstructions. For videos that were not trained on, `--holdout-every 0` judges every shot.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.distributed import JOB_FILE
from megatron_fsvideo.checkpoint.release import load_fsae, resolve_release
from megatron_fsvideo.config import FSAEJob, VideoDataConfig, from_dict, parse_job, run_script
from megatron_fsvideo.data.clip_dataset import ClipDataset, open_clips
from megatron_fsvideo.data.video import from_unit
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.inference.contact_sheet import write_contact_sheet
from megatron_fsvideo.models.fsae import FSAE, fingerprint

METRICS = ("psnr", "ssim", "first_frame_psnr", "last_frame_psnr")


@dataclass(frozen=True)
class EvaluateFlags:
    """what to judge and where to write"""

    load: str
    """Release folder, or --save folder of pretrain_fsae.py."""
    video_dir: str
    """Folder of video files."""
    out: str
    """JSON file to write; a PNG of the same name shows originals and reconstructions."""
    num_frames: int | None = None
    """Frames per clip; none takes the training's."""
    resolution: int | None = None
    """Side of the centre crops, in pixels; none takes the training's validation size."""
    short_side: int | None = None
    """Videos are resized to this short side; none takes the training's."""
    holdout_every: int | None = None
    """Every n-th shot of each video is judged, 0 takes all; none takes the training's, so that these are unseen."""
    num_clips: int = 8
    """Clips, spread evenly over the shots (rounded up to as many for each)."""
    num_shown: int = 3
    """Clips in the PNG."""
    device: str = "cpu"
    """Where to run, such as cpu or cuda."""


@dataclass(frozen=True)
class EvaluateJob:
    """Judge an autoencoder by its reconstructions."""

    evaluate: EvaluateFlags


def main() -> None:
    """Parse, reconstruct, write."""
    flags = parse_job(EvaluateJob).evaluate
    fsae = load_fsae(flags.load, flags.device)
    data = clip_choice(flags)
    videos = judged_clips(data).fixed_clips(flags.num_clips, data.num_frames, data.resolution)
    reconstructions = reconstruct(fsae, videos, torch.device(flags.device))
    report = {
        "autoencoder": str(resolve_release(flags.load)),
        "fingerprint": fingerprint(fsae),
        "clips": {
            "num_frames": data.num_frames,
            "resolution": data.resolution,
            "short_side": data.short_side,
            "holdout_every": data.holdout_every,
            "count": len(videos),
        },
        **measure(videos, reconstructions),
    }
    out = Path(flags.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    write_contact_sheet(out.with_suffix(".png"), sheet_rows(videos, reconstructions, flags.num_shown))
    print(" | ".join(f"{name} {report[name]:.3f}" for name in METRICS))


def clip_choice(flags: EvaluateFlags) -> VideoDataConfig:
    """The clips to judge: what the flags say, else what the training run held out, else the paper's 17x256x256."""
    job_file = resolve_release(flags.load).parent / JOB_FILE
    trained = VideoDataConfig()
    if job_file.is_file():
        trained = from_dict(FSAEJob, json.loads(job_file.read_text())["job"]).data
    given = {
        name: getattr(flags, name)
        for name in ("num_frames", "short_side", "holdout_every")
        if getattr(flags, name) is not None
    }
    resolution = flags.resolution or trained.valid_side
    return replace(trained, video_dir=flags.video_dir, resolution=resolution, valid_resolution=None, **given)


def judged_clips(data: VideoDataConfig) -> ClipDataset:
    """The held-out shots, or all shots with `holdout_every` 0."""
    clips, held_out = open_clips(data, seed=0)
    return held_out if held_out is not None else clips


def sheet_rows(videos: Tensor, reconstructions: Tensor, num_shown: int) -> list[tuple[str, Tensor]]:
    """Original and reconstruction of up to `num_shown` clips, spread over all."""
    chosen = torch.linspace(0, len(videos) - 1, max(1, min(num_shown, len(videos)))).round().int().tolist()
    named = (("original", videos), ("reconstruction", reconstructions))
    return [(f"{name}, clip {k}", from_unit(clips[k])) for k in chosen for name, clips in named]


@torch.no_grad()
def reconstruct(fsae: FSAE, videos: Tensor, device: torch.device) -> Tensor:
    """Each of [n, 3, f, h, w] encoded and decoded by itself, clamped to [-1, 1]."""
    clips = [fsae.decode(fsae.encode(video.unsqueeze(0).to(device))).clamp(-1, 1).cpu() for video in videos]
    return torch.cat(clips)


def measure(videos: Tensor, reconstructions: Tensor) -> dict[str, object]:
    """Metrics of each clip and their means; PSNR in dB."""
    frames = psnr_per_frame(reconstructions, videos)
    per_clip = {
        "psnr": frames.mean(dim=1),
        "ssim": torch.cat([ssim(a[None], b[None]) for a, b in zip(reconstructions, videos, strict=True)]),
        "first_frame_psnr": frames[:, 0],
        "last_frame_psnr": frames[:, -1],
    }
    return {
        **{name: round(float(values.mean()), 4) for name, values in per_clip.items()},
        "per_clip": [
            {name: round(float(values[k]), 4) for name, values in per_clip.items()} for k in range(len(videos))
        ],
    }


if __name__ == "__main__":
    run_script(main)
