"""Compare the six phases that all_phases.py trained: a table (JSON, markdown) and a picture.

    python examples/fsae/all_phases_report.py --folder runs/fsae_all_phases --video-dir runs/fsae_all_phases/videos

Held-out shots, each phase with the same clips; Standard and Lite with and without the first frame's features. The
perceptual distance is EfficientNet-Lite0's, a stand-in: not LPIPS.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.release import load_fsae
from megatron_fsvideo.config import FSAE_PRESETS, VideoDataConfig, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, PositiveInt
from megatron_fsvideo.data.clip_dataset import open_clips
from megatron_fsvideo.data.contact_sheet import write_contact_sheet
from megatron_fsvideo.data.outputs import write_json, write_text
from megatron_fsvideo.data.video import from_unit
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss, load_perceptual_loss
from megatron_fsvideo.models.fsae import FSAE

PRESET = "fsae_quickstart"
MEASURES = ("psnr", "first_frame_psnr", "last_frame_psnr", "ssim", "perceptual")
WHAT = {
    1: "pixels",
    2: "+ adversary",
    3: "mixed shapes, tiles, patches",
    4: "+ alignment",
    5: "Standard decoder",
    6: "Lite decoder",
}


@dataclass(frozen=True)
class ReportFlags(Checked):
    """what to compare"""

    folder: PathText = "runs/fsae_all_phases"
    """Output folder of all_phases.py."""
    video_dir: PathText = "runs/fsae_all_phases/videos"
    """Folder of the training's films. Their held-out shots are evaluated."""
    num_clips: PositiveInt = 8
    """Number of clips, spread evenly over the shots."""


@dataclass(frozen=True)
class ReportJob:
    """Compare the six phases that all_phases.py trained."""

    report: ReportFlags = field(default_factory=ReportFlags)


def main() -> None:
    """Parse the command line, reconstruct, measure and write."""
    flags = parse_job(ReportJob).report
    folder = Path(flags.folder)
    videos = held_out_clips(flags)
    perceptual = load_perceptual_loss("efficientnet-lite0", None, torch.device("cpu"))
    middle = len(videos) // 2
    rows, pictures = [], [("original", from_unit(videos[middle]))]
    for phase, what in WHAT.items():
        fsae = load_fsae(str(folder / f"phase{phase}"), "cpu")
        for with_features in (False, True) if fsae.config.decoder != "causal" else (False,):
            reconstructions = reconstruct(fsae, videos, with_features)
            rows.append({"phase": phase, "what": what, "first_frame_features": with_features})
            rows[-1] |= measure(reconstructions, videos, perceptual)
            name = f"phase {phase}: {what}{', first frame' if with_features else ''}"
            pictures.append((name, from_unit(reconstructions[middle])))
    report = {"clips": list(videos.shape), "perceptual_distance": perceptual.label, "rows": rows}
    report["differences"] = differences(rows)
    text = table(rows, perceptual.label) + differences_table(report["differences"])
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", text)
    write_contact_sheet(folder / "reconstructions.png", pictures)
    print(text)


def held_out_clips(flags: ReportFlags) -> Tensor:
    """Read the held-out clips [n, 3, f, h, w], equal for all phases.

    Raises:
        ValueError: no shot is held out.
    """
    preset = FSAE_PRESETS[PRESET]
    values = {name: preset[name] for name in ("num_frames", "short_side", "holdout_every")}
    side = preset["valid_resolution"]
    _, held_out = open_clips(VideoDataConfig(video_dir=flags.video_dir, resolution=side, **values), seed=0)
    if held_out is None:
        raise ValueError(f"{flags.video_dir}: no shot is held out; give films of at least {values['holdout_every']}")
    return held_out.fixed_clips(flags.num_clips, values["num_frames"], side)


@torch.no_grad()
def reconstruct(fsae: FSAE, videos: Tensor, with_features: bool) -> Tensor:
    """Reconstruct each clip by itself, clamped to [-1, 1]."""
    clips = []
    for video in videos.split(1):
        features = fsae.first_frame_features(video[:, :, :1]) if with_features else None
        clips.append(fsae.decode(fsae.encode(video), features).clamp(-1, 1))
    return torch.cat(clips)


@torch.no_grad()
def measure(reconstructions: Tensor, videos: Tensor, perceptual: PerceptualLoss) -> dict[str, float]:
    """Measures of the reconstructions, as means over clips; PSNR in dB."""
    frames = psnr_per_frame(reconstructions, videos)
    pairs = list(zip(reconstructions.split(1), videos.split(1), strict=True))
    values = {
        "psnr": frames.mean(),
        "first_frame_psnr": frames[:, 0].mean(),
        "last_frame_psnr": frames[:, -1].mean(),
        "ssim": torch.stack([ssim(a, b).mean() for a, b in pairs]).mean(),
        "perceptual": torch.stack([perceptual(a, b) for a, b in pairs]).mean(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def differences(rows: list[dict]) -> list[dict]:
    """Gain or loss of the later decoders: each measure of one row minus that of another."""
    by_kind = {(row["phase"], row["first_frame_features"]): row for row in rows}
    pairs = {
        "Standard minus causal (phase 4)": ((5, True), (4, False)),
        "Standard: first frame given minus not": ((5, True), (5, False)),
        "Lite: first frame given minus not": ((6, True), (6, False)),
        "Lite minus Standard": ((6, True), (5, True)),
    }
    return [
        {"what": what} | {name: round(by_kind[a][name] - by_kind[b][name], 4) for name in MEASURES}
        for what, (a, b) in pairs.items()
    ]


def differences_table(found: list[dict]) -> str:
    """Markdown."""
    lines = [
        "\n| difference | PSNR | of frame 0 | of the last | SSIM | perceptual distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        values = [f"{row[name]:+.2f}" for name in MEASURES[:3]]
        lines.append(f"| {row['what']} | {' | '.join(values)} | {row['ssim']:+.3f} | {row['perceptual']:+.4f} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict], label: str) -> str:
    """Markdown."""
    head = "| phase | trained | first frame given | PSNR | of frame 0 | of the last | SSIM | perceptual distance |\n"
    lines = [head + "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        given = "yes" if row["first_frame_features"] else "no"
        values = [f"{row[name]:.2f}" for name in MEASURES[:3]]
        values += [f"{row['ssim']:.3f}", f"{row['perceptual']:.4f}"]
        lines.append(f"| {row['phase']} | {row['what']} | {given} | {' | '.join(values)} |")
    return "\n".join(lines) + f"\n\nHeld-out shots; the perceptual distance is of {label}.\n"


if __name__ == "__main__":
    run_script(main)
