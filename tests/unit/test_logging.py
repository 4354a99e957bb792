"""metrics.jsonl after kills and restarts, and the loop's order of events."""

import json

import pytest
import torch

from megatron_fsvideo.config import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron_fsvideo.training.logging import (
    METRICS_FILE,
    MetricsLogger,
    read_metrics,
    truncate_metrics,
)
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.state import StepResult, TrainState


class CountingStep:
    """Reports the iteration as the loss and records what it was asked to do."""

    networks: dict = {}

    def __init__(self) -> None:
        self.events: list[str] = []

    def train_step(self, state: TrainState) -> StepResult:
        self.events.append(f"train {state.iteration + 1}")
        loss = float(state.iteration + 1)
        return StepResult(
            {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1},
            num_samples=3,
            num_tokens=30,
        )

    def validate(self) -> dict[str, float]:
        self.events.append("validate")
        return {"loss": 0.5}

    def save(self, state: TrainState, networks: dict) -> None:
        self.events.append(f"save {state.iteration}")

    def generate(self, state: TrainState) -> None:
        return None

    def is_saving(self) -> bool:
        return False

    def finish(self) -> None:
        pass


def run(folder, iterations, first=0, log_interval=1, **training):
    step, state = CountingStep(), TrainState(first, 3 * first)
    settings = TrainingConfig(train_iters=iterations, **training)
    logger = MetricsLogger(LoggingConfig(log_interval, str(folder)), iterations, first)
    train(step, step, state, settings, CheckpointConfig(save="unused", save_interval=2), logger)
    return step.events


def test_order_of_events(tmp_path):
    events = run(tmp_path, 5, eval_iters=1, eval_interval=4)
    expected = "validate|train 1|train 2|save 2|train 3|train 4|validate|save 4|train 5|validate|save 5"
    assert events == expected.split("|")


def test_exit_interval_saves_once(tmp_path):
    assert run(tmp_path, 9, exit_interval=3)[-2:] == ["train 3", "save 3"]
    assert run(tmp_path, 9, exit_interval=2)[-2:] == ["train 2", "save 2"]


def test_a_finished_run_does_nothing_more(tmp_path):
    assert run(tmp_path, 4, first=4) == []


def test_resumed_file_equals_unbroken(tmp_path):
    run(tmp_path / "unbroken", 6)
    run(tmp_path / "killed", 5)
    with (tmp_path / "killed" / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 6, "lo')
    run(tmp_path / "killed", 6, first=3)
    rows = [read_metrics(tmp_path / name / METRICS_FILE) for name in ("unbroken", "killed")]
    losses = [[(row["iteration"], row["consumed_samples"], row["loss"]) for row in each] for each in rows]
    assert losses[0] == losses[1] == [(k, 3 * k, float(k)) for k in range(1, 7)]


def test_fields_and_interval(tmp_path):
    run(tmp_path, 7, log_interval=3)
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["iteration"] for row in rows] == [1, 3, 6, 7]
    names = "iteration consumed_samples loss grad_norm learning_rate iteration_time tokens_per_second model_tflops mfu"
    assert list(rows[0]) == [*names.split(), "data_wait", "peak_memory_bytes"]
    assert rows[0]["tokens_per_second"] == pytest.approx(30 / rows[0]["iteration_time"])


def test_nan_is_null(tmp_path):
    logger = MetricsLogger(LoggingConfig(1, str(tmp_path)), 1)
    logger.log_step(TrainState(1, 1), StepResult({"loss": float("nan")}, 1), 0.1)
    assert json.loads((tmp_path / METRICS_FILE).read_text())["loss"] is None


def test_a_new_run_in_an_old_folder_keeps_the_rows_of_the_old_one(tmp_path):
    path = tmp_path / METRICS_FILE
    rows = ['{"iteration": 0}\n', '{"iteration": 1}\n', '{"iteration": 2}\n']
    path.write_text("".join(rows) + '{"itera')
    assert truncate_metrics(path, 0) == 3
    assert path.read_text() == "" and (tmp_path / "metrics_dropped.jsonl").read_text() == "".join(rows)
    # What is done again after a kill is kept there too; nothing to move leaves the file as it is.
    path.write_text("".join(rows))
    assert [truncate_metrics(path, 1), truncate_metrics(path, 1)] == [1, 0]
    assert path.read_text() == "".join(rows[:2])
    assert (tmp_path / "metrics_dropped.jsonl").read_text() == "".join([*rows, rows[2]])


def test_other_ranks_write_nothing(tmp_path):
    logger = MetricsLogger(LoggingConfig(1, str(tmp_path / "none")), 1, is_rank_zero=False)
    logger.log_step(TrainState(1, 1), StepResult({"loss": 1.0}, 1), 0.1)
    logger.log_validation(TrainState(1, 1), {"loss": 1.0})
    logger.close()
    assert not (tmp_path / "none").exists()


def test_mfu_is_a_share_of_the_stated_peak(tmp_path):
    for folder, peak in (("with", 4.0), ("without", None)):
        logger = MetricsLogger(LoggingConfig(1, str(tmp_path / folder), peak), 1, world_size=2)
        logger.log_step(TrainState(1, 1), StepResult({"loss": 1.0}, 1, flops=6e12), 1.5)
        logger.close()
    rows = [read_metrics(tmp_path / folder / METRICS_FILE)[0] for folder in ("with", "without")]
    assert [row["model_tflops"] for row in rows] == [2.0, 2.0]  # 6 TFLOP in 1.5 s on two devices
    assert rows[0]["mfu"] == 0.5
    if not torch.cuda.is_available():
        assert rows[1]["mfu"] is None
    with pytest.raises(ValueError, match="peak_tflops must be a number above 0 or none, got -1"):
        LoggingConfig(peak_tflops=-1)
