"""A run that is asked to leave does the iteration at hand, saves and returns; a hopeless one stops."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_fsvideo.config import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron_fsvideo.training.logging import METRICS_FILE, MetricsLogger, read_metrics
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.signals import EXIT_INTERRUPTED, SIGNALS, ExitRequest, age_minutes
from megatron_fsvideo.training.state import StepResult, TrainState


class Step:
    """Does something at given iterations and records what it was asked to do.

    Args:
        actions: iteration -> called within it.
        skipped: iterations whose loss is not finite.
        writing: boundaries that pass before a checkpoint is written.
    """

    networks: dict = {}

    def __init__(self, actions=None, skipped=(), writing=0) -> None:
        self.actions = actions or {}
        self.skipped = skipped
        self.writing, self.left, self.in_flight = writing, 0, False
        self.events: list[str] = []

    def train_step(self, state: TrainState) -> StepResult:
        iteration = state.iteration + 1
        self.events.append(f"train {iteration}")
        self.actions.get(iteration, lambda: None)()
        reason = "the loss is nan; samples a b" if iteration in self.skipped else None
        return StepResult({"loss": float("nan") if reason else 1.0}, 1, skipped=reason)

    def validate(self) -> dict[str, float]:
        return {}

    def save(self, state: TrainState, networks: dict) -> None:
        self.finish()
        self.events.append(f"save {state.iteration}")
        self.left, self.in_flight = self.writing, True

    def generate(self, state: TrainState) -> None:
        return None

    def is_saving(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def finish(self) -> None:
        if self.in_flight:
            self.events.append("finish")
        self.in_flight = False


def run(step, folder=None, any_rank=list, save_interval=0, **training):
    settings = TrainingConfig(**({"train_iters": 6} | training))
    logger = MetricsLogger(LoggingConfig(100, folder and str(folder)), settings.train_iters)
    train(step, step, TrainState(), settings, CheckpointConfig(save="s", save_interval=save_interval), logger, any_rank)
    return [event for event in step.events if event != "finish"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_at_the_end_of_the_iteration(number):
    before = signal.getsignal(number)
    step = Step({2: lambda: os.kill(os.getpid(), number)})
    assert run(step) == ["train 1", "train 2", "save 2"]
    assert signal.getsignal(number) is before


def interrupt_at_iteration_two(log: Path, pause: float) -> None:
    sys.stderr = log.open("w", buffering=1)

    def interrupts() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        blocked = threading.Lock()
        blocked.acquire()
        blocked.acquire(timeout=1 if pause < 1 else 60)  # as in a collective: no Python runs

    events = run(Step({2: interrupts}))
    os._exit(7 if events[-1] == "save 2" else 8)


@pytest.mark.parametrize(("pause", "code"), [(0.01, 7), (1.1, EXIT_INTERRUPTED)], ids=["torchrun_repeats_it", "again"])
def test_an_interrupt_saves_and_a_second_one_leaves_at_once(pause, code, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=interrupt_at_iteration_two, args=(tmp_path / "log", pause)
    )
    process.start()
    process.join(30)
    alive, text = process.is_alive(), (tmp_path / "log").read_text()
    process.kill()
    assert (alive, process.exitcode) == (False, code)
    assert text.startswith("interrupted: saving") and ("left without saving" in text) == (code == EXIT_INTERRUPTED)


def test_another_ranks_signal_counts():
    heard = []

    def any_rank(flags):
        heard.append(flags)
        return [flags[0], len(heard) == 3, *flags[2:]]

    assert run(Step(), any_rank=any_rank)[-2:] == ["train 3", "save 3"]


def test_a_signal_at_the_last_iteration_saves_once():
    step = Step({6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert run(step)[-2:] == ["train 6", "save 6"]


def test_without_the_handler_a_signal_is_not_ours():
    noted = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    try:
        events = run(Step({2: lambda: os.kill(os.getpid(), signal.SIGUSR1)}), exit_signal_handler=False)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert noted == [signal.SIGUSR1] and events[-1] == "save 6"


def test_the_time_that_a_process_has():
    assert 0 < age_minutes() < 24 * 60
    assert run(Step(), exit_duration_in_mins=1e-9) == ["train 1", "save 1"]
    assert run(Step(), exit_duration_in_mins=24 * 60.0)[-1] == "save 6"


def test_the_reason_names_everything():
    request = ExitRequest(True, 5.0)
    assert request.explain([False] * 4) is None
    assert request.explain([True, False, False, True]) == "SIGTERM and exit_duration_in_mins 5.0 is over"


def test_a_skipped_step_is_logged_and_counted(tmp_path):
    assert run(Step(skipped=(3, 4)), tmp_path, max_consecutive_skipped=3)[-1] == "save 6"
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [(row["iteration"], row.get("skipped")) for row in rows] == [
        (1, None),
        (3, "the loss is nan; samples a b"),
        (4, "the loss is nan; samples a b"),
        (6, None),
    ]
    assert rows[1]["loss"] is None and rows[1]["consumed_samples"] == 3


def test_too_many_skipped_steps_stop_the_run_after_the_save_at_hand():
    step = Step(skipped=(1, 3, 4, 5), writing=9)
    with pytest.raises(ValueError, match="3 optimizer steps in a row.*samples a b"):
        run(step, save_interval=2, max_consecutive_skipped=3)
    assert step.events[-2:] == ["train 5", "finish"]


def test_a_checkpoint_in_the_background_is_finished_when_it_is_written():
    step = Step(writing=2)
    run(step, save_interval=3)
    expected = "train 1|train 2|train 3|save 3|train 4|train 5|finish|train 6|save 6|finish"
    assert step.events == expected.split("|")


SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" > "$LOG/requeued"; fi
"""
SRUN = """#!/bin/bash
trap 'exit '"$LEAVES_WITH" USR1
echo $$ > "$LOG/starting" && mv "$LOG/starting" "$LOG/started"
while :; do sleep 0.02; done
"""
SCANCEL = """#!/bin/sh
kill -USR1 "$(cat "$LOG/started")"
"""


@pytest.mark.parametrize("script", ["examples/dit/stage1_slurm.sh", "examples/fsae/train_slurm.sh 1"])
@pytest.mark.parametrize("leaves_with", [0, 1])
def test_the_slurm_script_passes_the_signal_on_and_requeues(script, leaves_with, tmp_path):
    """With stand-ins for SLURM's commands: the ranks get the signal; the job is queued again if they could save."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "LEAVES_WITH": str(leaves_with),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n",
    }
    job = subprocess.Popen(["bash", *str(Path(__file__).parents[2] / script).split()], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == leaves_with
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (leaves_with == 0)
    assert leaves_with or requeued.read_text() == "requeue 17\n"
