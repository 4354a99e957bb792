"""From nothing to a generated video on a laptop: fetch films, train the autoencoder, encode, train the DiT, generate.

    make quickstart                                       (or, with the package installed:)
    python examples/quickstart/run.py [--long] [--video-dir YOUR_VIDEOS]

Every phase is a command that you could type; it is printed before it runs. Finished phases are skipped when you run
this again; remove runs/quickstart to start over. At the end runs/quickstart holds sample.mp4, contact_sheet.png and
report.json.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText

BUCKET = "9x80x80"
NUM_PROCESSES = 2
# Six steps make fewer speckles than thirty: a model trained for minutes errs a little at every step.
NUM_INFERENCE_STEPS = 6
# Rows of a text embedding. The captions have at most five tokens; attention to rows of padding teaches nothing.
TEXT_LENGTH = 8
# Of the DiT, at the start and at the end; in the preset's batches of eight, all 32 held-out clips.
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


class Phases:
    """Runs commands in order, prints and times them, and remembers in a file which are done."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "phases.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, *command: str | Path) -> None:
        """Run one phase; stop with its exit code if it fails."""
        if name in self.seconds:
            print(f"\n== {name}: done before, in {self.seconds[name]:.0f} s", flush=True)
            return
        words = [str(word) for word in command]
        print(f"\n== {name}\n$ {shlex.join(words)}", flush=True)
        started = time.monotonic()
        if code := subprocess.run(_with_this_python(words), env=_environment(words)).returncode:
            raise SystemExit(f"quickstart stopped in phase {name} (exit code {code}); run it again to go on from there")
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.path.write_text(json.dumps(self.seconds, indent=1))


def quickstart(flags: QuickstartFlags) -> None:
    """All phases."""
    out = Path(flags.output_dir)
    phases = Phases(out)
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
    phases.run("train_fsae", *command, *_longer("fsae_quickstart", long), *longer)
    preset = FSAE_PRESETS["fsae_quickstart"]
    command = ["python", "tools/evaluate_fsae.py", "--load", fsae, "--video-dir", videos]
    command += ["--resolution", str(preset["valid_resolution"])]
    for name in ("num_frames", "short_side", "holdout_every"):
        command += ["--" + name.replace("_", "-"), str(preset[name])]
    phases.run("evaluate_fsae", *command, "--out", out / "fsae-evaluation" / "evaluation.json")


def make_latents(phases: Phases, out: Path, videos: Path) -> None:
    """Captioned camera pans over real frames, and real clips; then their latents and text embeddings."""
    pans = out / "pans"
    command = ["python", "examples/quickstart/make_pans.py", "--video-dir", videos, "--output-dir", pans]
    phases.run("make_pans", *command, "--bucket", BUCKET)
    for split in ("train", "heldout"):
        command = ["torchrun", "--nproc-per-node", str(NUM_PROCESSES), "tools/preprocess_latents.py"]
        command += ["--manifest", pans / "manifest.jsonl", "--split", split, "--fsae", out / "fsae"]
        command += ["--text-encoder", "minilm", "--text-max-length", str(TEXT_LENGTH)]
        command += ["--buckets", BUCKET, "--output", out / "latents" / split]
        phases.run(f"encode_{split}", *command)


def train_dit(phases: Phases, out: Path, long: bool) -> None:
    """Two processes share every layer (tensor and sequence parallelism)."""
    dit = out / "dit"
    command = ["torchrun", "--nproc-per-node", str(NUM_PROCESSES), "pretrain_dit.py", "--preset", "dit_quickstart"]
    command += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    command += ["--data-path", out / "latents" / "train", "--valid-data-path", out / "latents" / "heldout"]
    command += ["--eval-iters", str(VALIDATION_BATCHES)]
    command += ["--save", dit, "--load", dit, "--save-interval", "180", "--keep-checkpoints", "1"]
    phases.run("train_dit", *command, "--tensorboard-dir", out / "dit-logs", *_longer("dit_quickstart", long))


def generate(phases: Phases, out: Path) -> None:
    """One clip for each held-out first frame and prompt."""
    phases.run("requests", "python", "examples/quickstart/report.py", "--quickstart-dir", out, "--only-requests")
    command = ["python", "tools/generate.py", "--load", out / "dit", "--requests", out / "requests.jsonl"]
    command += ["--num-inference-steps", str(NUM_INFERENCE_STEPS), "--request-batch-size", "8"]
    phases.run("generate", *command)


def _longer(preset: str, long: bool) -> list[str]:
    """Flags that train four times as long as a preset."""
    if not long:
        return []
    return ["--train-iters", str(4 * (DIT_PRESETS | FSAE_PRESETS)[preset]["train_iters"])]


def _with_this_python(words: list[str]) -> list[str]:
    """`python` and `torchrun` of the environment that runs this script."""
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*launchers[words[0]], *words[1:]]


def _environment(words: list[str]) -> dict[str, str]:
    """Processes that share a machine's cores share its threads."""
    cores = os.cpu_count() or 1
    threads = max(1, cores // NUM_PROCESSES) if words[0] == "torchrun" else cores
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Parse the command line and run."""
    quickstart(parse_job(QuickstartJob).quickstart)


if __name__ == "__main__":
    run_script(main)
