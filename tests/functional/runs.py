"""Runs of a training script in processes forked from the test: as from a shell, minus the import of megatron-core."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import megatron.core  # noqa: F401  imported before the fork, once
import torch

import pretrain_dit
from megatron_fsvideo.config import run_script
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics

TIMEOUT_SECONDS = 120


class Run:
    """A training script with these arguments on `world_size` ranks."""

    def __init__(
        self, argv: list[str], log: Path, world_size: int = 1, main: Callable[[], None] = pretrain_dit.main
    ) -> None:
        self.log = log
        context = multiprocessing.get_context("fork")
        port = _free_port()
        self.ranks = [
            context.Process(target=_work, args=(main, argv, log, rank, world_size, port)) for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self.ranks)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def wait(self) -> tuple[int, str]:
        """Exit code of rank 0 and everything that the ranks wrote to stderr."""
        for process in self.ranks:
            process.join(TIMEOUT_SECONDS)
            if process.is_alive():
                self.kill()
                raise AssertionError(f"no end within {TIMEOUT_SECONDS} s:\n{self.log.read_text()[-2000:]}")
        return self.ranks[0].exitcode, self.log.read_text()


def run_to_end(argv: list[str], log: Path, world_size: int = 1, main: Callable[[], None] = pretrain_dit.main) -> None:
    """Run and assert success."""
    code, text = Run(argv, log, world_size, main).wait()
    assert code == 0, text[-4000:]


def losses(folder: Path) -> dict[int, float]:
    """Iteration -> training loss in a folder's metrics.jsonl."""
    return {row["iteration"]: row["loss"] for row in read_metrics(folder / METRICS_FILE) if "loss" in row}


def debug_arguments(data: Path, save: Path, *more: str) -> list[str]:
    """The debug preset on a dataset, saving to and continuing from `save`, metrics in `save`/logs."""
    flags = f"--preset dit_debug --data-path {data} --save {save} --load {save} --tensorboard-dir {save}/logs"
    return [*flags.split(), *more]


def _work(main: Callable[[], None], argv: list[str], log: Path, rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    file = log.open("a")
    os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = file
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    sys.argv = [f"{main.__module__}.py", *argv]
    run_script(main)
    file.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
