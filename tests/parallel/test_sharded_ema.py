"""The average in the optimizer's shards equals one process's, takes its share of memory, and reloads in any layout."""

import math
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights
from megatron_fsvideo.checkpoint.save_folder import iteration_folder
from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, parse_job
from megatron_fsvideo.inference.loading import load_dit
from megatron_fsvideo.models.dit.weights import named_global_parameters
from megatron_fsvideo.optim.held import boxes
from megatron_fsvideo.optim.moving_average import warm_decay
from megatron_fsvideo.parallel import groups
from tests.functional.runs import debug_arguments
from tests.functional.tasks import begin_dit
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers

STEPS = 3
FLAGS = "--micro-batch-size 1 --global-batch-size 4 --lr 0.01 --train-iters 9 --eval-iters 1".split()
DISTRIBUTED = ["--use-distributed-optimizer"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "dp2": (DISTRIBUTED, 2),
    "dp3": ([*DISTRIBUTED, "--global-batch-size", "6"], 3),
    "tp2_dp2": ([*DISTRIBUTED, "--tensor-model-parallel-size", "2", "--sequence-parallel"], 4),
    "pp2_dp2": ([*DISTRIBUTED, *PP2], 4),
    "cp2": ([*DISTRIBUTED, "--context-parallel-size", "2"], 2),
}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1, 1, 2)])
def test_boxes_cover_any_range_in_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            parts = [
                numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten()
                for offset, size in boxes(shape, start, stop)
            ]
            found = torch.cat(parts).tolist() if parts else []
            assert found == list(range(start, stop))
            assert len(parts) <= 2 * len(shape) - 1


def train(argv: list[str], data: Path, save: Path, load: Path) -> dict:
    """Three steps from a checkpoint or from the start, a validation, a save; and the whole average as files have it."""
    argv = debug_arguments(data, save, *FLAGS, "--valid-data-path", str(data), *argv)
    argv[argv.index("--load") + 1] = str(load)
    job = parse_job(DiTJob, DIT_PRESETS, argv)
    pgs = groups.initialize(job.parallel)
    task, checkpoints, state = begin_dit(job, pgs)
    chunks, average = task.network.chunks, task.network.average
    with average.applied():
        whole = {name: parameter.detach().float().clone() for name, parameter in chunks.named_parameters()}
    for _ in range(STEPS):
        state.advance(task.train_step(state).num_samples)
        for name, parameter in chunks.named_parameters():
            whole[name].lerp_(parameter.detach().float(), 1 - warm_decay(average.decay, state.iteration))
    trained = [parameter.detach().clone() for parameter in chunks.parameters()]
    error = task.validate()["velocity_mse"]
    restored = all(torch.equal(a, b) for a, b in zip(trained, chunks.parameters(), strict=True))
    with average.applied():
        is_whole = all(torch.equal(whole[name], p.float()) for name, p in chunks.named_parameters())
    checkpoints.save(state, task.networks)
    checkpoints.finish()
    stored = DistributedWeights(iteration_folder(save, state.iteration), "dit.ema.")
    result = {
        "restored": restored,
        "is_whole": is_whole,
        "error": error,
        "bytes": sum(values.nbytes for values in average.weights.values()),
        "parameters": sum(parameter.numel() for parameter in chunks.parameters()),
        "average": {name: stored.read(name) for name in stored.infos},
    }
    groups.shutdown()
    return result


def swapped(argv: list[str], data: Path, save: Path) -> dict[str, torch.Tensor]:
    """The weights that the model has in validation, loaded from `save`."""
    job = parse_job(DiTJob, DIT_PRESETS, debug_arguments(data, save, *FLAGS, "--valid-data-path", str(data), *argv))
    task, _, _ = begin_dit(job, groups.initialize(job.parallel))
    with task.network.average.applied():
        found = {
            name: p.detach().clone() for chunk in task.network.chunks for name, p in named_global_parameters(chunk)
        }
    groups.shutdown()
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_latent_dataset(tmp_path_factory.mktemp("latents"))


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each weight's average to 20 times the tolerance (some gradients nearly vanish), all together to the tolerance."""
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - value).norm().item() for name, value in expected.items()}
    for name, value in expected.items():
        assert errors[name] <= 20 * tolerance * value.norm() + 1e-9, name
    norm = math.hypot(*(value.norm().item() for value in expected.values()))
    assert math.hypot(*errors.values()) <= tolerance * norm


@pytest.mark.parametrize("layout", [pytest.param("dp3", marks=pytest.mark.slow), "dp2", "tp2_dp2", "pp2_dp2", "cp2"])
def test_a_sharded_average_equals_one_process_s(layout, data, tmp_path):
    flags, world_size = LAYOUTS[layout]
    batch = flags[flags.index("--global-batch-size") :][:2] if "--global-batch-size" in flags else []
    alone = run_workers(train, 1, batch, data, tmp_path / "alone", tmp_path / "alone")[0]
    ranks = run_workers(train, world_size, flags, data, tmp_path / "run", tmp_path / "run")
    assert alone["bytes"] == 4 * alone["parameters"] and alone["restored"]
    share = world_size if layout.startswith(("dp", "cp")) else 2
    for rank in ranks:
        assert rank["restored"]
        assert rank["is_whole"], "bit for bit what an average of the whole weights would be"
        # Megatron pads buckets to multiples of the group; the shards hold no padding.
        assert rank["bytes"] == pytest.approx(4 * rank["parameters"] / share, rel=0.02)
        assert rank["error"] == pytest.approx(alone["error"], rel=1e-5)
        close(rank["average"], alone["average"], 1e-6)


def test_bf16_shards_average_the_masters_as_one_process_does(data, tmp_path):
    alone = run_workers(train, 1, ["--bf16"], data, tmp_path / "alone", tmp_path / "alone")[0]
    rank = run_workers(train, 2, ["--bf16", *DISTRIBUTED], data, tmp_path / "run", tmp_path / "run")[0]
    assert rank["restored"] and rank["error"] == pytest.approx(alone["error"], rel=1e-2)
    close(rank["average"], alone["average"], 2e-2)
    assert any((value.bfloat16().float() != value).any() for value in rank["average"].values())


def test_saved_at_dp2_continues_in_one_process_and_back(data, tmp_path):
    """Twice three steps: at two ranks then one, at one then two, all in one process."""
    runs = {"wide": (2, 1), "narrow": (1, 2), "alone": (1, 1)}
    averages = {}
    for name, (first, second) in runs.items():
        save = tmp_path / name
        run_workers(train, first, DISTRIBUTED, data, save, save)
        averages[name] = run_workers(train, second, DISTRIBUTED, data, save, save)[0]["average"]
    for name in ("wide", "narrow"):
        close(averages[name], averages["alone"], 1e-5)


def test_generation_and_validation_get_the_same_averaged_weights(data, tmp_path):
    trained = run_workers(train, 2, DISTRIBUTED, data, tmp_path / "run", tmp_path / "run")[0]
    generated = run_workers(loaded_for_generation, 1, tmp_path / "run")[0]
    for rank in run_workers(swapped, 2, DISTRIBUTED, data, tmp_path / "run"):
        for name, value in generated.items():
            assert torch.equal(rank[name], value), name
        assert len(rank) == len(trained["average"])


def loaded_for_generation(folder: Path) -> dict[str, torch.Tensor]:
    model = load_dit(folder, DiTParallelConfig(), groups.initialize(DiTParallelConfig())).model
    found = {name: parameter.detach().clone() for name, parameter in named_global_parameters(model)}
    groups.shutdown()
    return found
