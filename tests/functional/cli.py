"""Runs any script of this repository in processes forked from the test: as from a shell, without its imports' cost."""

import importlib.util
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import megatron.core  # noqa: F401  imported before the fork, once
import torch

from megatron_fsvideo.config import run_script
from megatron_fsvideo.parallel import groups  # noqa: F401

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 180


@dataclass(frozen=True)
class Result:
    """How rank 0 ended, and what all ranks wrote to stderr."""

    code: int
    stderr: str

    @property
    def last_line(self) -> str:
        """The line that a user sees last."""
        return self.stderr.strip().splitlines()[-1]


def run_cli(script: str, argv: list[str | Path], log: Path, world_size: int = 1) -> Result:
    """Run `script` (a path in this repository) with these arguments."""
    context = multiprocessing.get_context("fork")
    port = _free_port()
    words = [str(word) for word in argv]
    ranks = [
        context.Process(target=_work, args=(script, words, log, rank, world_size, port)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            for other in ranks:
                other.kill()
            raise AssertionError(f"{script} did not end within {TIMEOUT_SECONDS} s:\n{log.read_text()[-2000:]}")
    return Result(ranks[0].exitcode, log.read_text())


def _work(script: str, argv: list[str], log: Path, rank: int, world_size: int, port: int) -> None:
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
    sys.argv = [script, *argv]
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        run_script(module.main)
    except SystemExit as error:
        file.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)
    file.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
