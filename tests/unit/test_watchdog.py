"""A rank that hangs ends the run, with its number in the report; a rank that works does not."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.config import ParallelConfig
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.watchdog import EXIT_HUNG, PeerLostError, Sight, Watchdog, explain

LIMIT = 2.0


def wait_for_the_others(how: str, rank: int) -> None:
    if rank == 1 and how == "sleeps":
        time.sleep(600)
    if (rank, how) in ((1, "stopped"), (0, "store stopped")):
        os.kill(os.getpid(), signal.SIGSTOP)
    if (rank, how) in ((1, "dies"), (0, "store dies")):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "works":
        until = time.monotonic() + 2.5 * LIMIT
        while time.monotonic() < until:
            torch.ones(10).sum()
    groups.barrier()


def work(rank: int, how: str, log: Path, port: int) -> None:
    torch.set_num_threads(1)
    sys.stderr = log.open("a")
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pgs = groups.initialize(ParallelConfig())
    groups.barrier()
    limit = 100 * LIMIT if how == "works" and rank != 1 else LIMIT
    try:
        with Watchdog(pgs, limit) as watchdog:
            watchdog.iteration = lambda: 7
            groups.barrier()
            wait_for_the_others(how, rank)
    except PeerLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def run(how: str, log: Path) -> tuple[list[int | None], str]:
    """Exit codes of three ranks and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, how, log, port)) for rank in range(3)]
    for process in ranks:
        process.start()
    stopped = {"stopped": ranks[1], "store stopped": ranks[0]}.get(how)
    for process in sorted(ranks, key=lambda process: process is stopped):
        process.join(0.1 if process is stopped else 100)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes, log.read_text()


def reports(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_the_missing_rank_is_named(how, tmp_path):
    codes, text = run(how, tmp_path / "log")
    assert codes == [EXIT_HUNG, None if how == "stopped" else EXIT_HUNG, EXIT_HUNG], text
    report, *later = reports(text)
    # On a busy machine a rank may come to look when the one that keeps the store has reported and gone.
    assert all("does not answer" in line for line in later), text
    assert "no progress" in report and "after iteration 7" in report
    missing = report.split("missing: ")[1].split(". Of those")[0]
    assert missing.startswith("rank 1 (") and "rank 0" not in missing and "rank 2" not in missing
    assert ("does not answer" in missing) == (how == "stopped")


def test_a_stopped_rank_that_holds_the_store_ends_the_run_too(tmp_path):
    """Without torchrun rank 0 keeps the store: its calls do not come back."""
    codes, text = run("store stopped", tmp_path / "log")
    assert codes == [None, EXIT_HUNG, EXIT_HUNG], text
    lines = reports(text)
    assert len(lines) == 2 and all("rank 0, or the launcher" in line and "no progress" in line for line in lines), text


@pytest.mark.parametrize(("how", "lost"), [("dies", 1), ("store dies", 0)])
def test_a_rank_that_dies_is_named_in_one_line(how, lost, tmp_path):
    codes, text = run(how, tmp_path / "log")
    assert codes == [-signal.SIGKILL if rank == lost else 1 for rank in range(3)], text
    lines = reports(text)
    assert len(lines) == 2 and "Traceback" not in text, text
    assert any(line.startswith(f"error: rank {lost}") for line in lines), text
    assert all("died or left after iteration 7" in line for line in lines), text


def test_a_rank_that_works_for_long_is_left_alone(tmp_path):
    codes, text = run("works", tmp_path / "log")
    assert codes == [0, 0, 0] and not reports(text), text


def test_one_process_needs_no_watching(tmp_path):
    before = threading.active_count()

    class Alone:
        world_size = 1

    with Watchdog(Alone(), LIMIT):
        assert threading.active_count() == before


def test_the_report_says_where_everybody_is():
    waiting = Sight(9, 600.0, "training/loop.py:90 _should_leave", True, 41)
    reading = Sight(9, 590.0, "data/batch.py:99 read_batch", False, 41)
    text = explain([waiting, None, reading, waiting], 600.0)
    assert "no progress for 10 minutes after iteration 41" in text
    assert "rank 1 (does not answer" in text and "rank 2 (at data/batch.py:99 read_batch)" in text
    assert "rank 0 3 at training/loop.py:90 _should_leave waiting" in text
    assert "no rank is obviously missing" in explain([waiting, waiting], 600.0)
