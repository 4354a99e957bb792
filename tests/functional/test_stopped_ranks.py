"""SIGSTOP to any rank, the one that keeps the job's store included, ends the run with 75 and a line that says so."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_fsvideo.checkpoint.save_folder import LATEST_FILE, latest_iteration
from megatron_fsvideo.parallel.watchdog import EXIT_HUNG
from megatron_fsvideo.training.logging import METRICS_FILE
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.functional.test_resume import wait_for_first_line
from tests.latent_fixtures import write_latent_dataset

ROOT = Path(__file__).parents[2]
FLAGS = "--train-iters 4000 --save-interval 1 --keep-checkpoints 2 --micro-batch-size 1".split()
FLAGS += ["--distributed-timeout-minutes", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_torchrun(rank: int, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = debug_arguments(data, folder, *FLAGS)
    run = Run(argv, tmp_path / "log", 2)
    wait_for_first_line(run, folder / LATEST_FILE)
    os.kill(run.ranks[rank].pid, signal.SIGSTOP)
    other = run.ranks[1 - rank]
    other.join(100)
    code, text = other.exitcode, run.log.read_text()
    run.kill()
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == EXIT_HUNG and "the run hangs: no progress" in line
    assert ("rank 0, or the launcher" in line) if rank == 0 else ("missing: rank 1 (does not answer" in line), text
    reached = latest_iteration(folder)
    run_to_end([*argv, "--exit-interval", "1"], tmp_path / "again", 2)
    assert latest_iteration(folder) == reached + 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun(rank: int, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*command, str(ROOT / "pretrain_dit.py"), *debug_arguments(data, folder, *FLAGS)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 100
        while not (folder / "logs" / METRICS_FILE).exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        children = psutil.Process(launcher.pid).children()
        ranks = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
        ranks[str(rank)].suspend()
        launcher.wait(150)
    finally:
        launcher.kill()
    text = (tmp_path / "log").read_text()
    assert launcher.returncode != 0 and f"exitcode  : {EXIT_HUNG}" in text, text
    assert f"missing: rank {rank} (does not answer" in text
