"""Two trained networks and a frozen one in front: every layout trains, saves and resumes as one process does."""

import functools
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.run_record import RunDescription
from megatron_fsvideo.config import CheckpointConfig, DiTParallelConfig
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.state import TrainState
from tests.parallel.harness import run_workers
from tests.parallel.toy_task import TRAINING, ToyTask

LAYOUTS = {
    "tp2": (2, True, {"tensor_model_parallel_size": 2}),
    "tp2_sp_recompute": (
        2,
        True,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "dp2_distributed_optimizer": (2, True, {"use_distributed_optimizer": True}),
    "dp2_overlap": (2, True, {"overlap_grad_reduce": True}),
    "pp2": (2, False, {"pipeline_model_parallel_size": 2}),
    "pp2_virtual2": (2, False, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}


def train(task: ToyTask, state: TrainState) -> list[dict[str, float]]:
    rows = []
    while state.iteration < TRAINING.train_iters:
        result = task.train_step(state)
        state.advance(result.num_samples)
        rows.append(result.metrics)
    return rows


def train_and_resume(folder: Path, plain: bool, settings: dict) -> tuple[list, list]:
    """Metrics of all iterations, and of those after the checkpoint when it is resumed."""
    parallel = DiTParallelConfig(**settings)
    pgs = groups.initialize(parallel)
    task, state = ToyTask(parallel, pgs, plain), TrainState()
    rows = []
    for _ in range(2):
        result = task.train_step(state)
        state.advance(result.num_samples)
        rows.append(result.metrics)
    config = CheckpointConfig(save=str(folder), load=str(folder))
    checkpoints = RunCheckpoints(config, lambda: RunDescription({}), pgs, train_iters=TRAINING.train_iters)
    checkpoints.save(state, task.networks)
    checkpoints.finish()
    rows += train(task, state)
    again = ToyTask(parallel, pgs, plain)
    state = checkpoints.load(again.networks)
    assert (state.iteration, state.consumed_samples) == (2, 2 * TRAINING.global_batch_size)
    resumed = train(again, state)
    groups.shutdown()
    return rows, resumed


@functools.cache
def one_process(plain: bool, folder: Path) -> list[dict[str, float]]:
    ((rows, resumed),) = run_workers(train_and_resume, 1, folder, plain, {})
    assert resumed == rows[2:]
    assert len({row["loss"] for row in rows}) == len(rows) and all(row["grad_norm"] > 0.01 for row in rows)
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_networks_train_save_and_resume(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world_size, plain, settings = LAYOUTS[name]
    expected = one_process(plain, tmp_path_factory.getbasetemp() / f"one_{plain}")
    for rows, resumed in run_workers(train_and_resume, world_size, tmp_path / "run", plain, settings):
        assert resumed == rows[2:], "bit for bit"
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
