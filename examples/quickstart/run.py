"""From nothing to a generated video on a laptop: fetch films, train the autoencoder, encode, train the DiT, generate.

    make quickstart                                       (or, with the package installed:)
    python examples/quickstart/run.py [--long] [--video-dir YOUR_VIDEOS]

Every phase is a command that you could type; it is printed before it runs. When you run this again, finished phases are
skipped as long as their commands and the videos are the same. At the end runs/quickstart holds sample.mp4,
contact_sheet.png and report.json.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText
from megatron_fsvideo.data.phases import Phases

BUCKET = "9x80x80"
NUM_PROCESSES = 2
# Six steps make fewer speckles than thirty: a model trained for minutes errs a little at every step.
NUM_INFERENCE_STEPS = 6
# Rows of a text embedding. The captions have at most five tokens; attention to rows of padding teaches nothing.
TEXT_LENGTH = 8
# Validation batches of the DiT, at the start and at the end: all 32 held-out clips in the preset's batches of eight.
VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class QuickstartFlags(Checked):
    """what to run"""

    output_dir: PathText = "runs/quickstart"
    """Folder for all results."""
    video_dir: PathText | None = None
    """Folder of your own films, with several shots each. None fetches films."""
    long: bool = False
    """Train four times as long."""


@dataclass(frozen=True)
class QuickstartJob:
    """From raw video to a generated mp4, on two CPU cores."""

    quickstart: QuickstartFlags = field(default_factory=QuickstartFlags)


def quickstart(flags: QuickstartFlags) -> None:
    """Run all phases."""
    out = Path(flags.output_dir)
    phases = Phases(out, NUM_PROCESSES)
    videos = Path(flags.video_dir) if flags.video_dir else out / "videos"
    if flags.video_dir is None:
        phases.run("fetch", "python", "examples/quickstart/fetch_clips.py", "--output-dir", videos)
    train_autoencoder(phases, out, videos, flags.long)
    make_latents(phases, out, videos)
    train_dit(phases, out, flags.long)
    generate(phases, out)
    phases.run("report", "python", "examples/quickstart/report.py", "--quickstart-dir", out)
    print(f"\nLook at {out / 'contact_sheet.png'}, {out / 'sample.mp4'} and {out / 'report.json'}.")
    print("What a model trained for minutes can and cannot show: docs/quickstart.md")


def train_autoencoder(phases: Phases, out: Path, videos: Path, long: bool) -> None:
    """Train on three quarters of the shots, measure on the rest."""
    fsae = out / "fsae"
    command = ["python", "pretrain_fsae.py", "--preset", "fsae_quickstart", "--video-dir", videos]
    command += ["--save", fsae, "--load", fsae, "--save-interval", "200", "--tensorboard-dir", out / "fsae-logs"]
    images = FSAE_PRESETS["fsae_quickstart"]["image_warmup_iters"]
    longer = ["--image-warmup-iters", str(4 * images)] if long else []
    command += [*_longer("fsae_quickstart", long), *longer]
    phases.run("train_fsae", *command, inputs=[videos], outputs=[fsae, out / "fsae-logs"])
    preset = FSAE_PRESETS["fsae_quickstart"]
    command = ["python", "tools/evaluate_fsae.py", "--load", fsae, "--video-dir", videos]
    command += ["--resolution", str(preset["valid_resolution"])]
    for name in ("num_frames", "short_side", "holdout_every"):
        command += ["--" + name.replace("_", "-"), str(preset[name])]
    phases.run("evaluate_fsae", *command, "--out", out / "fsae-evaluation" / "evaluation.json", "--overwrite")


def make_latents(phases: Phases, out: Path, videos: Path) -> None:
    """Make captioned camera pans over real frames, and real clips, then their latents and text embeddings."""
    pans = out / "pans"
    command = ["python", "examples/quickstart/make_pans.py", "--video-dir", videos, "--output-dir", pans]
    phases.run("make_pans", *command, "--bucket", BUCKET, outputs=[pans])
    for split in ("train", "heldout"):
        command = ["torchrun", "--nproc-per-node", str(NUM_PROCESSES), "tools/preprocess_latents.py"]
        command += ["--manifest", pans / "manifest.jsonl", "--split", split, "--fsae", out / "fsae"]
        command += ["--text-encoder", "minilm", "--text-max-length", str(TEXT_LENGTH)]
        latents = out / "latents" / split
        phases.run(f"encode_{split}", *command, "--buckets", BUCKET, "--output", latents, outputs=[latents])


def train_dit(phases: Phases, out: Path, long: bool) -> None:
    """Train on two processes that share every layer (tensor and sequence parallelism)."""
    dit = out / "dit"
    command = ["torchrun", "--nproc-per-node", str(NUM_PROCESSES), "pretrain_dit.py", "--preset", "dit_quickstart"]
    command += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    command += ["--data-path", out / "latents" / "train", "--valid-data-path", out / "latents" / "heldout"]
    command += ["--eval-iters", str(VALIDATION_BATCHES)]
    command += ["--save", dit, "--load", dit, "--save-interval", "180", "--keep-checkpoints", "1"]
    command += ["--tensorboard-dir", out / "dit-logs", *_longer("dit_quickstart", long)]
    phases.run("train_dit", *command, outputs=[dit, out / "dit-logs"])


def generate(phases: Phases, out: Path) -> None:
    """Generate one clip for each held-out first frame and prompt."""
    phases.run("requests", "python", "examples/quickstart/report.py", "--quickstart-dir", out, "--only-requests")
    command = ["python", "tools/generate.py", "--load", out / "dit", "--requests", out / "requests.jsonl"]
    command += ["--num-inference-steps", str(NUM_INFERENCE_STEPS), "--request-batch-size", "8", "--overwrite"]
    phases.run("generate", *command, outputs=[out / "generated"])


def _longer(preset: str, long: bool) -> list[str]:
    """Flags for training four times as long as a preset."""
    if not long:
        return []
    return ["--train-iters", str(4 * (DIT_PRESETS | FSAE_PRESETS)[preset]["train_iters"])]


def main() -> None:
    """Parse the command line and run."""
    quickstart(parse_job(QuickstartJob).quickstart)


if __name__ == "__main__":
    run_script(main)
