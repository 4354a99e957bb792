"""Train the same small DiT with and without layer memory and plot both losses: the paper's Figure 7, in small.

    python examples/layer_memory/compare.py --latents runs/quickstart/latents/train \
        --valid-latents runs/quickstart/latents/heldout --output-dir runs/layer_memory

Each seed is a pair of runs that see the same clips, noise and sigmas in the same order; only the routers differ.
Finished runs are kept when you run this again. Leaves losses.png, comparison.json and the runs themselves.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_fsvideo.config import parse_job, require, run_script
from megatron_fsvideo.config.rules import Checked, PathText, PositiveInt
from megatron_fsvideo.data.outputs import write_json
from megatron_fsvideo.data.phases import Phases
from megatron_fsvideo.data.text_files import read_jsonl

# Deep rather than wide: more layers give layer memory more states. Muon is off: the paper trains with AdamW.
MODEL = "--preset dit_quickstart --num-layers 12 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 512"
TRAINING = "--optimizer adam --lr 1e-3 --log-interval 1"
SWITCHES = {"with layer memory": "--layer-memory", "without": "--no-layer-memory"}


@dataclass(frozen=True)
class CompareFlags(Checked):
    """what to compare on"""

    latents: PathText
    """Latent dataset for training."""
    valid_latents: PathText
    """Latent dataset for validation."""
    output_dir: PathText = "runs/layer_memory"
    """Folder for all results."""
    num_seeds: PositiveInt = 3
    """Number of pairs of runs."""
    train_iters: PositiveInt = 400
    """Iterations of each run."""
    smoothing: PositiveInt = 25
    """Number of iterations that each point of a plotted curve averages."""


@dataclass(frozen=True)
class CompareJob:
    """Pairs of training runs, with and without layer memory."""

    compare: CompareFlags


def train(flags: CompareFlags, phases: Phases, seed: int, switch: str) -> Path:
    """Train one run and return its metrics file."""
    folder = Path(flags.output_dir) / f"seed{seed}{switch}"
    command = ["python", "pretrain_dit.py", *MODEL.split(), *TRAINING.split(), switch, "--seed", str(seed)]
    command += ["--data-path", flags.latents, "--valid-data-path", flags.valid_latents, "--eval-iters", "8"]
    command += ["--train-iters", str(flags.train_iters), "--tensorboard-dir", str(folder)]
    inputs = [Path(flags.latents), Path(flags.valid_latents)]
    phases.run(f"seed {seed} {switch}", *command, inputs=inputs, outputs=[folder])
    return folder / "metrics.jsonl"


def read_curve(metrics: Path) -> tuple[list[float], float]:
    """Read (loss of each iteration, validation error at the end) of one run."""
    rows = [row for _, row in read_jsonl(metrics)]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses, [row for row in rows if "validation_velocity_mse" in row][-1]["validation_velocity_mse"]


def smoothed(losses: list[float], window: int) -> list[float]:
    """Means over the last `window` iterations."""
    return [sum(losses[k - window : k]) / window for k in range(window, len(losses) + 1)]


def compare(flags: CompareFlags) -> None:
    """Train every pair, then plot and tabulate."""
    pyplot = require("matplotlib.pyplot", "eval")
    figure, (axis, change_axis) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6.5), height_ratios=(3, 2))
    phases = Phases(Path(flags.output_dir))
    table = []
    for seed in range(flags.num_seeds):
        row: dict[str, float] = {"seed": seed}
        curves = []
        for (name, switch), color in zip(SWITCHES.items(), ("tab:red", "tab:blue"), strict=True):
            losses, validation = read_curve(train(flags, phases, seed, switch))
            curve = smoothed(losses, flags.smoothing)
            curves.append(curve)
            label = name if seed == 0 else None
            axis.plot(range(flags.smoothing, len(losses) + 1), curve, color=color, alpha=0.7, label=label)
            row |= {f"loss, {name}": round(curve[-1], 5), f"validation, {name}": round(validation, 5)}
        for kind in ("loss", "validation"):
            on, off = (row[f"{kind}, {name}"] for name in SWITCHES)
            row[f"{kind}, change by layer memory"] = round(on / off - 1, 4)
        table.append(row)
        changes = [100 * (on / off - 1) for on, off in zip(*curves, strict=True)]
        change_axis.plot(range(flags.smoothing, len(changes) + flags.smoothing), changes, label=f"seed {seed}")
    axis.set(ylabel=f"training loss, mean of {flags.smoothing} iterations", yscale="log")
    axis.legend()
    change_axis.axhline(0, color="black", linewidth=0.5)
    change_axis.set(xlabel="iteration", ylabel="change by layer memory, %")
    change_axis.legend()
    figure.tight_layout()
    figure.savefig(Path(flags.output_dir) / "losses.png", dpi=150)
    write_json(Path(flags.output_dir) / "comparison.json", table)
    print(json.dumps(table, indent=1))


def main() -> None:
    """Parse the command line and compare."""
    compare(parse_job(CompareJob).compare)


if __name__ == "__main__":
    run_script(main)
