"""All six training phases of the autoencoder on a laptop's CPU, for real and small: about 25 minutes on two cores.

    python examples/fsae/all_phases.py --output-dir runs/fsae_all_phases [--video-dir YOUR_VIDEOS]

Every phase is a command that you could type; it is printed before it runs. Finished phases are skipped when you run
this again, an interrupted one goes on from its newest checkpoint; remove the folder to start over. At the end it holds
report.json, report.md and reconstructions.png.

A small ImageNet network from a package replaces weights of the paper that need a download: EfficientNet-Lite0 stands in
for VGG16 in the perceptual loss, and for DINOv2 in phase 4. The figures are therefore not the paper's.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_fsvideo.config import FSAE_PRESETS, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, Positive
from megatron_fsvideo.data.phases import Phases

PRESET = "fsae_quickstart"
ITERATIONS = {1: 660, 2: 96, 3: 56, 4: 32, 5: 160, 6: 120}
SHORTEST = 4  # fewest iterations of a phase, however small --scale is

_PERCEPTUAL = "--perceptual-weight 0.1 --perceptual-trunk efficientnet-lite0"
_ADVERSARY = (
    "--gan-weight 0.1 --discriminator-width 16 --discriminator-scales 2 --discriminator-layers 2 --image-warmup-iters 0"
)
# Shapes of about as many pixels; large frames are encoded in tiles and decoded on 96 of 128 pixels, as phase 3 does.
_MIXED = "--buckets 9x128x128 17x64x64 33x64x64 --micro-batch-size 1 --encoder-tile 64 --patch-rows 12"
_MIXED += " --patch-columns 12 --perceptual-frames 8 --recompute-granularity full"
_FINETUNE = "--muon-lr 0.005 --lr 5e-4"
# As in the paper's phases, only the decoder is trained, with attention to the first frame and noise.
_DECODER = "--latent-noise 0 --muon-lr 0.01 --lr 1e-3 --first-frame-head-dim 32"

FLAGS = {
    1: _PERCEPTUAL,
    2: f"{_PERCEPTUAL} {_ADVERSARY} {_FINETUNE}",
    3: f"{_PERCEPTUAL} {_ADVERSARY} {_FINETUNE} {_MIXED}",
    4: f"{_PERCEPTUAL} {_ADVERSARY} {_FINETUNE} {_MIXED} --vf-encoder-path efficientnet-lite0 --vf-grid 8",
    5: f"{_PERCEPTUAL} {_ADVERSARY} {_DECODER} {_MIXED} --decoder standard",
    6: f"{_PERCEPTUAL} {_ADVERSARY} {_DECODER} {_MIXED} --decoder lite --decoder-widths 16 32 64 128",
}


@dataclass(frozen=True)
class AllPhasesFlags(Checked):
    """what to run"""

    output_dir: PathText = "runs/fsae_all_phases"
    """Folder for all results."""
    video_dir: PathText | None = None
    """Folder of your own films, with several shots of at least 33 frames each. None fetches films."""
    scale: Positive = 1.0
    """Factor of the number of iterations of each phase. 0.01 only shows that every phase runs."""


@dataclass(frozen=True)
class AllPhasesJob:
    """Train the autoencoder through its six phases, small, and judge it after each."""

    phases: AllPhasesFlags = field(default_factory=AllPhasesFlags)


def all_phases(flags: AllPhasesFlags) -> None:
    """Fetch films, train the phases, and judge all of them."""
    out = Path(flags.output_dir)
    phases = Phases(out)
    videos = Path(flags.video_dir) if flags.video_dir else out / "videos"
    if flags.video_dir is None:
        phases.run("fetch", "python", "examples/quickstart/fetch_clips.py", "--output-dir", videos)
    for phase in FLAGS:
        made = [out / f"phase{phase}", out / "logs" / f"phase{phase}"]
        command = training(phase, out, videos, flags.scale)
        phases.run(f"train phase {phase}", "python", *command, inputs=[videos], outputs=made)
    phases.run("report", "python", *report(out, videos))
    print(f"\nLook at {out / 'report.md'} and {out / 'reconstructions.png'}.")


def training(phase: int, out: Path, videos: Path, scale: float) -> list[str | Path]:
    """The command that trains a phase from the one before."""
    folder = out / f"phase{phase}"
    iterations = max(SHORTEST, round(scale * ITERATIONS[phase]))
    command = ["pretrain_fsae.py", "--preset", PRESET, "--phase", str(phase), "--video-dir", videos, "--save", folder]
    command += ["--load", folder, "--save-interval", "50", "--keep-checkpoints", "1"]
    command += ["--tensorboard-dir", out / "logs" / f"phase{phase}"]
    command += ["--train-iters", str(iterations), *FLAGS[phase].split()]
    if phase == 1:
        images = FSAE_PRESETS[PRESET]["image_warmup_iters"]
        command += ["--image-warmup-iters", str(min(iterations - 2, max(2, round(scale * images))))]
    if phase == 2:
        command += ["--discriminator-warmup-iters", str(iterations // 8)]
    if phase > 1:
        command += ["--init-from", out / f"phase{phase - 1}"]
    return command


def report(out: Path, videos: Path) -> list[str | Path]:
    """The command that judges all phases on held-out shots."""
    return ["examples/fsae/all_phases_report.py", "--folder", out, "--video-dir", videos]


def main() -> None:
    """Parse the command line and run."""
    all_phases(parse_job(AllPhasesJob).phases)


if __name__ == "__main__":
    run_script(main)
