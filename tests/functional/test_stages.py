"""Training stages: data and schedule change; weights, average, optimizer state and iteration go on bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.dit.task import DiTTask
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from megatron_fsvideo.training.state import TrainState
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.functional.tasks import begin_dit
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers

IMAGES, SMALL, WIDE = "1x32x32", "5x32x32", "5x32x64"
FIRST, SECOND = 4, 10  # iterations at the ends of the stages
COMMON = "--micro-batch-size 1 --global-batch-size 4 --lr-warmup-iters 2".split()
DISTRIBUTED = ["--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "images": write_latent_dataset(folder / "images", 24, buckets=(IMAGES,)),
        "videos": write_latent_dataset(folder / "videos", 20, seed=1, buckets=(SMALL, WIDE), latent_std=3.0),
        "stranger": write_latent_dataset(folder / "stranger", 20, fingerprint="b" * 64),
    }


def first_stage(data: dict[str, Path], folder: Path, *more: str) -> list[str]:
    flags = ["--train-iters", str(FIRST), "--lr", "0.01"]
    return debug_arguments(data["images"], folder, *COMMON, *flags, "--bucket-frames", "1", *more)


def second_stage(data: dict[str, Path], before: Path, folder: Path, *more: str) -> list[str]:
    argv = debug_arguments(data["videos"], folder, *COMMON, "--train-iters", str(SECOND), "--lr", "0.003")
    argv[argv.index("--load") + 1] = str(before)
    switched = "--new-stage --seed 7 --global-batch-size 2 --sigma-shift 3 --loss-type rfpp".split()
    return [*argv, *switched, "--save-interval", "2", *more]


@pytest.fixture(scope="module")
def image_stage(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1") / "run"
    run_to_end(first_stage(data, folder, *DISTRIBUTED), folder.with_suffix(".log"), 2)
    return folder


def optimizer_tensors(task: DiTTask) -> list[torch.Tensor]:
    """Master weights and moments of this rank, in the optimizer's order."""
    tensors = []
    for link in task.network.optimizer.chained_optimizers:
        for group in link.optimizer.param_groups:
            for parameter in group["params"]:
                state = link.optimizer.state[parameter]
                tensors += [parameter, *(state[name] for name in sorted(state))]
    return [tensor.detach().clone() for tensor in tensors]


def switch(first: list[str], second: list[str]) -> dict:
    """Train the first stage, save it, begin the second: what both have in memory."""
    pgs = groups.initialize(parse_job(DiTJob, DIT_PRESETS, first).parallel)
    before, checkpoints, state = begin_dit(parse_job(DiTJob, DIT_PRESETS, first), pgs)
    while state.iteration < FIRST:
        state.advance(before.train_step(state).num_samples)
    checkpoints.save(state, before.networks)
    checkpoints.finish()
    after, _, reached = begin_dit(parse_job(DiTJob, DIT_PRESETS, second), pgs)
    result = {
        "counters": [reached.iteration, reached.consumed_samples],
        "normalization": [list(values) for values in (after.dataset.scale.mean, after.dataset.scale.std)],
        "learning_rates": sorted({group["lr"] for group in after.network.optimizer.param_groups}),
        "optimizer": [optimizer_tensors(task) for task in (before, after)],
        "weights": [[p.detach().clone() for p in task.network.chunks.parameters()] for task in (before, after)],
        "average": [[v.clone() for v in task.network.average.weights.values()] for task in (before, after)],
        "next": after.train_step(TrainState(reached.iteration, 0)).metrics["learning_rate"],
    }
    groups.shutdown()
    return result


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [([], 1), (["--bf16"], 1), (["--bf16", *DISTRIBUTED], 2), (["--optimizer", "muon"], 1)],
    ids=["adam", "bf16", "distributed_optimizer", "muon"],
)
def test_a_switch_keeps_weights_average_and_optimizer_bit_for_bit(flags, world_size, data, tmp_path):
    first = first_stage(data, tmp_path / "first", *flags)
    for rank in run_workers(switch, world_size, first, second_stage(data, tmp_path / "first", tmp_path / "b", *flags)):
        assert rank["counters"] == [FIRST, 0]
        assert rank["normalization"] == [[0.0] * 4, [1.0] * 4], "the weights know latents of the first stage's scale"
        # The second stage's rates; the routers' is AdamW's.
        expected = {0.003} | ({0.02} if "muon" in flags else set())
        assert rank["learning_rates"] == pytest.approx(sorted(expected)) and rank["next"] == pytest.approx(0.003)
        for name in ("optimizer", "weights", "average"):
            before, after = rank[name]
            assert len(before) == len(after) > 0
            assert sum(tensor.abs().max() > 0 for tensor in before) > len(before) / 2, name
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


def test_a_stage_may_take_the_scale_of_its_own_data(data, image_stage, tmp_path):
    argv = second_stage(data, image_stage, tmp_path / "run", "--latent-scale", "data", "--exit-interval", "2")
    ((mean, std),) = run_workers(scale_of, 1, argv)
    assert mean == [0.0] * 4 and std == [3.0] * 4, "the second stage's data say so"


def scale_of(argv: list[str]) -> tuple[list[float], list[float]]:
    job = parse_job(DiTJob, DIT_PRESETS, argv)
    task, _, _ = begin_dit(job, groups.initialize(job.parallel))
    scale = task.dataset.scale
    groups.shutdown()
    return list(scale.mean), list(scale.std)


def logged(folder: Path) -> list[dict[str, float]]:
    names = ("iteration", "consumed_samples", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def test_a_run_killed_within_the_second_stage_goes_on_exactly(data, image_stage, tmp_path):
    run_to_end(second_stage(data, image_stage, tmp_path / "unbroken", *DISTRIBUTED), tmp_path / "log", 2)
    expected = logged(tmp_path / "unbroken")
    assert [row["iteration"] for row in expected] == list(range(FIRST + 1, SECOND + 1))
    assert expected[0]["consumed_samples"] in (2, 4), "the second stage's data begins at its first sample"
    argv = second_stage(data, image_stage, tmp_path / "broken", *DISTRIBUTED, "--exit-interval", "3")
    run_to_end(argv, tmp_path / "log", 2)
    assert logged(tmp_path / "broken") == expected[:3]
    run_to_end(argv, tmp_path / "log", 2)  # the same command: it continues its own checkpoint, and switches no more
    assert logged(tmp_path / "broken") == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--hidden-size", "96"], "another architecture: hidden_size: checkpoint 48, this run 96"),
        (["--data-path", "STRANGER"], "was trained on latents of the autoencoder"),
        (["--train-iters", "4"], "train_iters 4 leaves the new stage no iteration"),
        (["--optimizer", "muon"], "optimizer: checkpoint 'adam', this run 'muon'"),
        (["--no-new-stage"], "trained on 24 samples of 1x32x32 (weight 24), this run's data is 10 samples of 5x32x32"),
        (["--finetune"], "new_stage keeps optimizer and iteration, finetune starts them anew"),
        (["--save", "LOAD"], "give it a --save folder of its own, or leave --new-stage out to continue"),
        (["--bucket-frames", "9"], "bucket_frames 9 and bucket_resolution None leave none of its buckets: 5x32x32 (10"),
    ],
    ids=["architecture", "autoencoder", "iterations", "optimizer", "data", "finetune", "folder", "buckets"],
)
def test_a_switch_that_would_be_wrong_is_refused(change, words, data, image_stage, tmp_path):
    change = [{"STRANGER": str(data["stranger"]), "LOAD": str(image_stage)}.get(word, word) for word in change]
    run = Run(second_stage(data, image_stage, tmp_path / "run", *DISTRIBUTED, *change), tmp_path / "log")
    code, text = run.wait()
    assert code != 0 and words in text.strip().splitlines()[-1], text[-2000:]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("iter_*"))
