"""--profile records the iterations that it names, on the ranks that it names, also after a restart."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.config import CheckpointConfig, LoggingConfig, ProfilingConfig, TrainingConfig
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.profiling import IterationProfiler, profile_folder
from megatron_fsvideo.training.state import StepResult, TrainState


class MarkedStep:
    """Each iteration leaves its number in the trace."""

    networks: dict = {}

    def train_step(self, state: TrainState) -> StepResult:
        with torch.profiler.record_function(f"iteration {state.iteration + 1}"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        return StepResult({"loss": 1.0}, 1)

    def generate(self, state: TrainState) -> None:
        return None

    def is_saving(self) -> bool:
        return False

    def finish(self) -> None:
        pass


def run(folder: Path, iterations: int, first: int = 0, rank: int = 0, **profiling) -> None:
    profiler = IterationProfiler(ProfilingConfig(**profiling), folder, rank)
    logger = MetricsLogger(LoggingConfig(100), iterations, first)
    settings = TrainingConfig(train_iters=iterations, exit_signal_handler=False)
    step = MarkedStep()
    train(step, step, TrainState(first, first), settings, CheckpointConfig(), logger, profiler=profiler)


def recorded(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("iteration")})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").glob("*")) if (folder / "profile").exists() else []


WINDOW = {"profile": True, "profile_step_start": 2, "profile_step_end": 4}


@pytest.mark.parametrize(
    ("iterations", "first", "stem", "expected"),
    [
        (6, 0, "rank0_iterations_3_4", ["iteration 3", "iteration 4"]),
        (6, 3, "rank0_iterations_4_4", ["iteration 4"]),  # resumed within the window
        (3, 0, "rank0_iterations_3_3", ["iteration 3"]),  # ended within it
    ],
)
def test_window(tmp_path, iterations, first, stem, expected):
    run(tmp_path, iterations, first, **WINDOW)
    assert names(tmp_path) == [f"{stem}.pt.trace.json.gz", f"{stem}.txt"]
    assert recorded(tmp_path / "profile" / f"{stem}.pt.trace.json.gz") == expected
    assert "aten::mm" in (tmp_path / "profile" / f"{stem}.txt").read_text()


def test_nothing_outside_the_window_or_on_other_ranks(tmp_path):
    run(tmp_path, 2, **WINDOW)
    run(tmp_path, 8, first=4, **WINDOW)
    run(tmp_path, 6, rank=1, **WINDOW)
    run(tmp_path, 6)
    assert names(tmp_path) == []
    run(tmp_path, 6, rank=1, **WINDOW, profile_ranks=(1, 3))
    assert [name.split("_")[0] for name in names(tmp_path)] == ["rank1", "rank1"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="profile_step_start 4 must be less than profile_step_end 4"):
        ProfilingConfig(profile_step_start=4, profile_step_end=4)
    with pytest.raises(ValueError, match="below --tensorboard-dir or --save: give one"):
        IterationProfiler(ProfilingConfig(profile=True))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device; --profile alone"):
            IterationProfiler(ProfilingConfig(record_memory_history=True), tmp_path)


def test_folder_is_that_of_the_metrics_or_of_the_checkpoints():
    assert profile_folder(LoggingConfig(tensorboard_dir="a"), CheckpointConfig(save="b")) == Path("a")
    assert profile_folder(LoggingConfig(), CheckpointConfig(save="b")) == Path("b")
    assert profile_folder(LoggingConfig(), CheckpointConfig()) is None


@pytest.mark.gpu
def test_memory_snapshot(tmp_path):
    run(tmp_path, 5, record_memory_history=True, profile_step_start=2, profile_step_end=4)
    assert names(tmp_path) == ["rank0_iterations_3_4.memory.pickle"]
