"""A checkpoint that cannot be written says the true cause and what to do, and costs nothing that was saved before."""

import errno
import os
from pathlib import Path

from megatron_fsvideo.checkpoint.checksums import checksums_of, write_checksums
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE, latest_iteration, whole_iterations
from megatron_fsvideo.checkpoint.writer import CheckpointWriter, SaveError, Work
from megatron_fsvideo.config import ParallelConfig
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers

CAUSES = {
    errno.ENOSPC: ("No space left on device", "are free", "make room and start again"),
    errno.EDQUOT: ("quota", "are free", "larger quota"),
    errno.EACCES: ("Permission denied", "", "change the permissions of the folder"),
    errno.EROFS: ("Read-only file system", "", "this file system is read-only"),
    errno.EIO: ("Input/output error", "", "save to another disk"),
    errno.EMFILE: ("Too many open files", "", "start again"),
}


def whole(target: Path) -> Work:
    def write() -> None:
        (target / JOB_FILE).write_text("{}")

    return Work(2, write, lambda results: write_checksums(target, checksums_of(target, [JOB_FILE])))


def failing(number: int) -> Work:
    def write() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("torch's file writer covers it") from None

    return Work(2, write, lambda results: None)


def save_and_fail(folder: Path) -> dict[int, str]:
    pgs = groups.initialize(ParallelConfig())
    messages = {}
    for in_background in (False, True):
        writer = CheckpointWriter(folder, pgs, keep=1, in_background=in_background)
        writer.save(2, whole)
        writer.finish()
        for number in CAUSES:
            try:
                writer.save(4, lambda target, number=number: failing(number))
                writer.finish()
            except SaveError as error:
                messages[number] = str(error)
            assert latest_iteration(folder) == 2 and whole_iterations(folder) == [2]
            assert not (folder / "iter_0000004").exists()
    return messages


def test_the_true_cause_and_the_remedy(tmp_path):
    (messages,) = run_workers(save_and_fail, 1, tmp_path)
    assert messages.keys() == CAUSES.keys()
    for number, parts in CAUSES.items():
        message = messages[number]
        assert all(part.lower() in message.lower() for part in parts), message
        assert ("make room" in message) == ("are free" in message) == (number in (errno.ENOSPC, errno.EDQUOT))
        assert "the one of iteration 2 is kept" in message and "\n" not in message
