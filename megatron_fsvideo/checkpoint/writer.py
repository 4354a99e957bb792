"""Writes checkpoints, in the foreground or while training goes on, and names the newest one last.

    all ranks: make the folder -> plan, copy the state to host memory -> | each rank writes its files in a thread
    all ranks, at a later iteration's end: all have written -> rank 0 completes the folder, names it the newest

Every failure is made known to all ranks, which then raise the same error: a rank that failed alone would leave the
others waiting. Megatron's AsyncCallsQueue is not used, because it forks a process for each save: that process outlives
a killed rank and goes on writing into the folder that the restarted run overwrites.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_fsvideo.checkpoint.save_folder import (
    iteration_folder,
    latest_iteration,
    name_latest,
    remove_old_checkpoints,
)
from megatron_fsvideo.parallel.groups import ProcessGroups, gather_objects


class SaveError(ValueError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True)
class Work:
    """The work of one rank for a checkpoint.

    Attributes:
        num_bytes: approximate number of bytes to write.
        write: writes the rank's files and returns what `complete` needs. It may run in a thread during training, and
            must neither communicate nor read tensors that training changes.
        complete: called on rank 0 when all ranks have written, with the results of `write` in rank order.
    """

    num_bytes: int
    write: Callable[[], Any]
    complete: Callable[[list[Any]], None]


class CheckpointWriter:
    """Writes checkpoints. Every rank calls each method at the same iterations, except `is_writing`.

    Args:
        keep: number of checkpoints to keep, newest first; 0 keeps all.
        in_background: `save` returns while the files are being written.
    """

    def __init__(self, folder: Path, pgs: ProcessGroups, keep: int = 0, in_background: bool = False) -> None:
        self.folder = folder
        self.in_background = in_background
        self._pgs = pgs
        self._keep = keep
        self._job: _Job | None = None

    def save(self, iteration: int, plan: Callable[[Path], Work]) -> None:
        """Write one checkpoint, or begin to. Wait first for a checkpoint that is still being written.

        Args:
            plan: called on every rank with the folder; returns the rank's work.

        Raises:
            SaveError: this checkpoint, or the one before it, could not be written.
        """
        self.finish()
        target = iteration_folder(self.folder, iteration)
        job = _Job(iteration, target)
        if self._pgs.is_rank_zero:
            job.attempt(lambda: _make_empty(target))
        self._agree(job)
        job.work = plan(target)
        self._check_space(job)
        job.start(self.in_background)
        self._job = job
        if not self.in_background:
            self.finish()

    def resume_from(self, iteration: int) -> None:
        """Name the checkpoint that the run continues from; newer ones are damaged, and will be overwritten."""
        if self._pgs.is_rank_zero and latest_iteration(self.folder) != iteration:
            name_latest(self.folder, iteration)

    def is_writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, complete it and name it the newest.

        Raises:
            SaveError: the checkpoint could not be written. Its files are removed.
        """
        job, self._job = self._job, None
        if job is None:
            return
        if job.thread is not None:
            job.thread.join()
        self._agree(job)
        results = gather_objects(job.result)
        if self._pgs.is_rank_zero:
            job.attempt(lambda: self._publish(job, results))
        self._agree(job)
        if self._pgs.is_rank_zero:
            took = f"{_in_words(job.num_bytes)} in {time.monotonic() - job.started:.1f} s"
            tqdm.write(f"saved iteration {job.iteration} to {job.target}: {took}")  # print above a progress bar

    def _publish(self, job: "_Job", results: list[Any]) -> None:
        job.work.complete(results)
        sync_folder(job.target)
        name_latest(self.folder, job.iteration)
        remove_old_checkpoints(self.folder, job.iteration, self._keep)

    def _check_space(self, job: "_Job") -> None:
        """Refuse a checkpoint that does not fit on the disk before writing it. (A quota shows only while writing.)"""
        known = gather_objects((job.work.num_bytes, shutil.disk_usage(self.folder).free))
        job.num_bytes = sum(num_bytes for num_bytes, _ in known)
        free = min(free for _, free in known)
        if job.num_bytes > free:
            job.failure = _Failure(os.strerror(errno.ENOSPC), errno.ENOSPC)
        self._agree(job)

    def _agree(self, job: "_Job") -> None:
        """Raise on all ranks if any rank has failed, after removing the files."""
        failures = {rank: failure for rank, failure in enumerate(gather_objects(job.failure)) if failure}
        if not failures:
            return
        message = _failure_message(job, failures, self.folder)
        if self._pgs.is_rank_zero:
            shutil.rmtree(job.target, ignore_errors=True)
        raise SaveError(message) from job.error


class _Job:
    """One checkpoint that is being written."""

    def __init__(self, iteration: int, target: Path) -> None:
        self.iteration = iteration
        self.target = target
        self.started = time.monotonic()
        self.work: Work | None = None
        self.num_bytes = 0
        self.thread: threading.Thread | None = None
        self.result: Any = None
        self.failure: _Failure | None = None
        self.error: Exception | None = None

    def start(self, in_background: bool) -> None:
        if in_background:
            self.thread = threading.Thread(target=self.attempt, args=(self._write,), name="checkpoint", daemon=True)
            self.thread.start()
        else:
            self.attempt(self._write)

    def attempt(self, action: Callable[[], None]) -> None:
        """Record a failure instead of raising it, because the other ranks must learn of it first."""
        try:
            action()
        except Exception as error:
            self.failure, self.error = _root_cause(error), error

    def _write(self) -> None:
        self.result = self.work.write()


def sync_folder(folder: Path) -> None:
    """Return when the names of all files of a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # files that a killed run left half-written
    folder.mkdir(parents=True)


class _Failure(NamedTuple):
    """Why a rank could not write: the system's message, and its error number if there is one."""

    reason: str
    number: int | None


# Remedy by the system's error number.
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EACCES: "change the permissions of the folder, or save into another",
    errno.EPERM: "change the permissions of the folder, or save into another",
    errno.EROFS: "save into another folder: this file system is read-only",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "save to another disk: this one reports errors",
}


def _root_cause(error: BaseException) -> _Failure:
    """Find the OSError of a full disk, which torch's file writer hides behind a RuntimeError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return _Failure(cause.strerror or str(cause), cause.errno)
        cause = cause.__cause__ or cause.__context__
    return _Failure(f"{type(error).__name__}: {str(error).splitlines()[0]}", None)


def _failure_message(job: _Job, failures: dict[int, _Failure], folder: Path) -> str:
    by_reason: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        by_reason.setdefault(failure.reason, []).append(rank)
    reasons = "; ".join(f"{reason} (rank {' '.join(map(str, ranks))})" for reason, ranks in by_reason.items())
    number = next((failure.number for failure in failures.values() if failure.number is not None), None)
    room = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        room = f"; it needs {_in_words(job.num_bytes)}, {_in_words(free)} are free"
    remedy = f"{_REMEDIES[number]} and start again" if number in _REMEDIES else "start again"
    newest = latest_iteration(folder)
    kept = "there is none before it" if newest is None else f"the one of iteration {newest} is kept"
    return (
        f"the checkpoint of iteration {job.iteration} could not be written into {folder}: {reasons}{room}; {kept}: "
        f"{remedy}"
    )


def _in_words(num_bytes: int) -> str:
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.2f} MB"
    return f"{num_bytes / 1e9:.2f} GB"
