"""The learning rate of layer memory's routers, at the rate x width of a 14B model: a factor of 1 beside one of 10.

    python examples/layer_memory/router_rate.py --output-dir runs/router_rate

A router is a linear map of a token whose entries are of order 1, so that an Adam step moves its logits by about rate x
width. The 14B model has width 5120 and rate 1e-4: 0.5 a step with `--router-lr-mult 1`, 5 with 10. A model of width 128
at a rate of 1e-3 moves its own by as much with 4 and 40, which is what runs here. The clips are smooth fields of 32
channels that drift in one of four directions, which the text names; nothing has to be downloaded.

metric     greatest size of a logit in the last iteration; share of (token, router) pairs that give one state more than
           0.99 there; validation velocity error at the end
seeds      0, 1, 2 (of the weights, the noise and the clips)
pass line  factor 1 is the better default if in all three seeds its validation error is at most 1.02 times that of
           factor 10, and the greatest logit with factor 10 is at least twice that with factor 1

One process. Finished runs are kept when you run this again; each leaves a JSON file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, PositiveInt
from megatron_fsvideo.data.dataset_json import AutoencoderRecord, ImageRecord, LatentSpace, TextRecord
from megatron_fsvideo.data.latent_shards import DATASET_FILE
from megatron_fsvideo.data.latent_writer import LatentShardWriter, OwnClip
from megatron_fsvideo.data.outputs import write_json
from megatron_fsvideo.data.text_files import read_jsonl, read_object
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.tasks.dit.task import DiTTask
from megatron_fsvideo.training.run import run
from megatron_fsvideo.training.state import StepResult, TrainState

WIDTH, RATE = 128, 1e-3
WIDTH_14B, RATE_14B = 5120, 1e-4
FACTORS = (1, 10)
HARD = 0.99
SPLITS = {"train": 256, "valid": 64}
CHANNELS, FRAMES, SIDE, TEXT_WIDTH = 32, 3, 8, 384
DIRECTIONS = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}
MODEL = f"--preset dit_quickstart --num-layers 6 --hidden-size {WIDTH} --num-attention-heads 4 --ffn-hidden-size 512"
TRAINING = f"--optimizer adam --lr {RATE} --log-interval 10 --eval-iters 8 --no-bf16"


@dataclass(frozen=True)
class RateFlags(Checked):
    """where, and how long"""

    output_dir: PathText = "runs/router_rate"
    """Folder for all results."""
    num_seeds: PositiveInt = 3
    """Number of pairs of runs."""
    train_iters: PositiveInt = 150
    """Iterations of each run."""


@dataclass(frozen=True)
class RateJob:
    """Pairs of training runs, with the routers at two rates."""

    rate: RateFlags


class WatchedTask(DiTTask):
    """A DiT's task that records the routers' logits."""

    def __init__(self, job: DiTJob, pgs: ProcessGroups) -> None:
        super().__init__(job, pgs)
        self.greatest, self.hard = [], []
        for module in self.network.chunks.modules():
            if isinstance(module, LayerMemory):
                module.register_forward_pre_hook(self._look)

    def train_step(self, state: TrainState) -> StepResult:
        """Do one step; records of earlier steps are cleared."""
        self.greatest.clear()
        self.hard.clear()
        return super().train_step(state)

    def validate(self) -> dict[str, float]:
        """The validation error, and the last training step's logits."""
        seen = {"greatest_logit": max(self.greatest, default=0.0)}
        seen["hard_share"] = sum(self.hard) / max(1, len(self.hard))
        return super().validate() | seen

    def _look(self, module: LayerMemory, arguments: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            logits = nn.functional.linear(arguments[0].float(), module.router.weight, module.router.bias)
            self.greatest.append(logits.abs().max().item())
            self.hard.append((logits.softmax(-1).amax(-1) > HARD).float().mean().item())


def clips(seed: int, count: int) -> Iterator[OwnClip]:
    """Make smooth fields that drift by one cell per latent frame; the text is the direction's embedding."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = text_embeddings()
    for k in range(count):
        name, (rows, columns) = list(DIRECTIONS.items())[k % len(DIRECTIONS)]
        coarse = torch.randn(1, CHANNELS, 5, 5, generator=generator)
        field = nn.functional.interpolate(coarse, (SIDE + 2 * FRAMES,) * 2, mode="bicubic", align_corners=True)[0]
        at = [(FRAMES + rows * t, FRAMES + columns * t) for t in range(FRAMES)]
        latents = torch.stack([field[:, y : y + SIDE, x : x + SIDE] for y, x in at], dim=1)
        yield OwnClip(latents, 8.0, name, embeddings[name], source=f"{seed}-{k}")


def text_embeddings() -> dict[str, Tensor]:
    """Direction -> [2, e]; the empty text's is under ""."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, TEXT_WIDTH, generator=generator) for name in (*DIRECTIONS, "")}


def write_data(folder: Path, seed: int, count: int) -> Path:
    """Write a latent dataset of `count` clips, unless it exists."""
    if not (folder / DATASET_FILE).exists():
        autoencoder = AutoencoderRecord("drifting fields", "drifting fields", 8, 4, CHANNELS)
        writer = LatentShardWriter(folder, LatentSpace(autoencoder, TextRecord("names", TEXT_WIDTH, 2), ImageRecord()))
        writer.write(clips(seed, count))
        writer.finish(text_embeddings()[""])
    return folder


def measure(flags: RateFlags, seed: int, factor: int) -> dict[str, float]:
    """Do one run, or read the results of a finished one."""
    root = Path(flags.output_dir)
    result = root / f"seed{seed}_factor{factor}.json"
    if result.exists():
        return read_object(result)
    emulated = factor * RATE_14B * WIDTH_14B / (RATE * WIDTH)
    data, valid = (write_data(root / f"{name}{seed}", 1000 * k + seed, n) for k, (name, n) in enumerate(SPLITS.items()))
    logs = root / f"seed{seed}_factor{factor}"
    words = [*MODEL.split(), *TRAINING.split(), "--router-lr-mult", f"{emulated:g}", "--seed", str(seed)]
    words += ["--data-path", str(data), "--valid-data-path", str(valid), "--tensorboard-dir", str(logs)]
    run(parse_job(DiTJob, DIT_PRESETS, [*words, "--train-iters", str(flags.train_iters)]), WatchedTask)
    last = [row for _, row in read_jsonl(logs / "metrics.jsonl") if "validation_velocity_mse" in row][-1]
    names = ("velocity_mse", "greatest_logit", "hard_share")
    found = {"seed": seed, "factor": factor} | {name: last[f"validation_{name}"] for name in names}
    write_json(result, found)
    return found


def main() -> None:
    """Do all runs, and print the table and the verdict."""
    flags = parse_job(RateJob).rate
    rows = [[measure(flags, seed, factor) for factor in FACTORS] for seed in range(flags.num_seeds)]
    for row in rows:
        for found in row:
            print(json.dumps(found))
    passed = all(
        one["velocity_mse"] <= 1.02 * ten["velocity_mse"] and ten["greatest_logit"] >= 2 * one["greatest_logit"]
        for one, ten in rows
    )
    print(f"pass line: factor 1 is {'the better default' if passed else 'not shown to be better'}")


if __name__ == "__main__":
    run_script(main)
