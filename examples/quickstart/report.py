"""Write the quickstart's results: generation requests, the contact sheet, the sample and report.json.

    python examples/quickstart/report.py --quickstart-dir runs/quickstart --only-requests     (before generation)
    python examples/quickstart/report.py --quickstart-dir runs/quickstart                     (after it)

All figures are of held-out shots, which neither the autoencoder nor the DiT has seen.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from megatron_fsvideo.checkpoint.release import load_fsae
from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText
from megatron_fsvideo.data.contact_sheet import write_contact_sheet
from megatron_fsvideo.data.outputs import write_json, write_text
from megatron_fsvideo.data.phases import read_seconds
from megatron_fsvideo.data.text_files import read_jsonl, read_object
from megatron_fsvideo.data.video import from_unit, read_video, to_unit, write_video
from megatron_fsvideo.evaluation.motion import pan_direction
from megatron_fsvideo.evaluation.psnr import psnr_per_frame

MAX_SHIFT = 34
SAMPLE_SCALE = 2


@dataclass(frozen=True)
class ReportFlags(Checked):
    """what to report on"""

    quickstart_dir: PathText = "runs/quickstart"
    """Folder of the quickstart."""
    only_requests: bool = False
    """Write only the first frames and requests.jsonl, for tools/generate.py."""


@dataclass(frozen=True)
class ReportJob:
    """Requests before, contact sheet and report.json after the quickstart's generation."""

    report: ReportFlags = field(default_factory=ReportFlags)


@dataclass
class Case:
    """One held-out clip: true frames, direction of the prompt, and file of the generated clip."""

    truth: torch.Tensor
    caption: str
    direction: str
    image: Path
    out: Path


def heldout_cases(folder: Path) -> list[Case]:
    """The held-out pans of make_pans.py's manifest."""
    pans = folder / "pans"
    lines = [line for _, line in read_jsonl(pans / "manifest.jsonl")]
    cases = []
    for number, line in enumerate(line for line in lines if line["split"] == "heldout"):
        truth = read_video(pans / line["path"], line["start"], line["num_frames"])
        stem = f"{number:02d}_{line['direction']}"
        image, out = folder / "first_frames" / f"{stem}.png", folder / "generated" / f"{stem}.mp4"
        cases.append(Case(truth, line["caption"], line["direction"], image, out))
    return cases


def write_requests(folder: Path, cases: list[Case]) -> None:
    """Write the first frames as PNG, and one line for tools/generate.py for each."""
    (folder / "first_frames").mkdir(exist_ok=True)
    lines = []
    for number, case in enumerate(cases):
        Image.fromarray(case.truth[0].numpy()).save(case.image)
        image, out = (str(path.relative_to(folder)) for path in (case.image, case.out))
        request = {"image": image, "prompt": case.caption, "out": out, "seed": number}
        lines.append(json.dumps(request))
    write_text(folder / "requests.jsonl", "\n".join(lines) + "\n")


@torch.no_grad()
def reconstruct(folder: Path, cases: list[Case]) -> list[torch.Tensor]:
    """Reconstruct the true clip with the autoencoder, the best result a DiT on its latents could reach."""
    fsae = load_fsae(folder / "fsae")
    return [from_unit(fsae.decode(fsae.encode(to_unit(case.truth)[None]))[0]) for case in cases]


def generation_figures(
    cases: list[Case], reconstructions: list[torch.Tensor], generations: list[torch.Tensor]
) -> dict[str, float]:
    """Direction agreement, and PSNR of later frames, next to the PSNR of repeating the true first frame."""
    agree = [pan_direction(clip, MAX_SHIFT) == case.direction for case, clip in zip(cases, generations, strict=True)]
    generated = [_psnr(clip, case.truth) for case, clip in zip(cases, generations, strict=True)]
    repeated = [_psnr(case.truth[:1].expand_as(case.truth), case.truth) for case in cases]
    ceiling = [_psnr(clip, case.truth) for case, clip in zip(cases, reconstructions, strict=True)]
    figures = {
        "cases": len(cases),
        "direction_agreement": sum(agree) / len(cases),
        "truth_direction_agreement": sum(pan_direction(c.truth, MAX_SHIFT) == c.direction for c in cases) / len(cases),
        "psnr_generated": _later(generated),
        "psnr_repeat_first_frame": _later(repeated),
        "psnr_autoencoder_ceiling": _later(ceiling),
        "psnr_first_frame_generated": _first(generated),
        "psnr_first_frame_reconstructed": _first(ceiling),
    }
    figures["psnr_gain_over_repeat"] = figures["psnr_generated"] - figures["psnr_repeat_first_frame"]
    figures["first_frame_gap"] = figures["psnr_first_frame_reconstructed"] - figures["psnr_first_frame_generated"]
    return {name: round(value, 4) for name, value in figures.items()}


def training_figures(folder: Path) -> dict[str, float]:
    """The DiT's loss and validation error at the start and at the end."""
    rows = [row for _, row in read_jsonl(folder / "dit-logs" / "metrics.jsonl")]
    losses = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_velocity_mse" in row]
    bound = validations[-1]["validation_white_latents_bound"]
    return {
        "iterations": losses[-1]["iteration"],
        "loss_start": losses[0]["loss"],
        "loss_end": losses[-1]["loss"],
        "validation_mse_start": validations[0]["validation_velocity_mse"],
        "validation_mse_end": validations[-1]["validation_velocity_mse"],
        "white_latents_bound": bound,
        "validation_mse_below_bound": 1 - validations[-1]["validation_velocity_mse"] / bound,
    }


def write_pictures(
    folder: Path, cases: list[Case], reconstructions: list[torch.Tensor], generations: list[torch.Tensor]
) -> None:
    """Write the contact sheet of one first frame under the four prompts, and the four clips as one video."""
    first = 4 * (len(cases) // 8)  # the middle case, so that it is neither of the first nor of the last film
    chosen = range(first, first + 4)
    rows = []
    for k in chosen:
        rows += [
            (f'truth: "{cases[k].caption}"', cases[k].truth),
            ("reconstruction by the autoencoder", reconstructions[k]),
            ("generation from the first frame and the prompt", generations[k]),
        ]
    write_contact_sheet(folder / "contact_sheet.png", rows)
    top, bottom = (torch.cat([generations[k] for k in pair], dim=2) for pair in (chosen[:2], chosen[2:]))
    grid = torch.cat([top, bottom], dim=1)
    large = grid.repeat_interleave(SAMPLE_SCALE, dim=1).repeat_interleave(SAMPLE_SCALE, dim=2)
    write_video(folder / "sample.mp4", large, fps=8)


def report(flags: ReportFlags) -> None:
    """Write the requests, or everything else."""
    folder = Path(flags.quickstart_dir)
    cases = heldout_cases(folder)
    if flags.only_requests:
        write_requests(folder, cases)
        return
    reconstructions = reconstruct(folder, cases)
    generations = [read_video(case.out) for case in cases]
    write_pictures(folder, cases, reconstructions, generations)
    content = {
        "seconds": read_seconds(folder),
        "autoencoder": read_object(folder / "fsae-evaluation" / "evaluation.json"),
        "dit": training_figures(folder),
        "generation": generation_figures(cases, reconstructions, generations),
        "note": "Held-out shots only. Trained for minutes: camera pans are learnt, other motion is not.",
    }
    content["seconds"]["total"] = round(sum(content["seconds"].values()), 1)
    write_json(folder / "report.json", content)
    print(json.dumps(content, indent=1))


def _psnr(clip: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """PSNR of each frame [f]; clips uint8 [f, h, w, 3]."""
    return psnr_per_frame(to_unit(clip)[None], to_unit(truth)[None])[0]


def _first(values: list[torch.Tensor]) -> float:
    return torch.stack([value[0] for value in values]).mean().item()


def _later(values: list[torch.Tensor]) -> float:
    return torch.stack([value[1:].mean() for value in values]).mean().item()


def main() -> None:
    """Parse the command line and report."""
    report(parse_job(ReportJob).report)


if __name__ == "__main__":
    run_script(main)
