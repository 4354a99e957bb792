"""Ends a run in which a rank hangs or dies, and says which one: the others would wait, or print what gloo prints.

A thread of each rank looks where the rank's program is. A rank that stays at one place for too long is stuck; most of
them only wait for another. The thread publishes what it sees; of the stuck ranks the first prints the report.
"""

import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.heartbeat import Heartbeats, is_peer_loss

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command; starting it again is sensible.
EXIT_HUNG = 75
# Where a program is that waits for other ranks.
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", "p2p_communication.py")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Sight:
    """Values that one rank's thread publishes.

    Attributes:
        beat: grows by one each time: a rank whose beat stands still does not answer.
        stuck_for: seconds at the same place.
        place: file, line and function of ours.
        is_waiting: the program is inside a collective operation.
        iteration: that are done.
        host, process: where the rank runs; empty and 0 if unknown.
    """

    beat: int
    stuck_for: float
    place: str
    is_waiting: bool
    iteration: int
    host: str = ""
    process: int = 0


class PeerLostError(ValueError):
    """Another rank's process has gone; the message names it where it is known."""


class Watchdog:
    """Context in which a rank that stays at one place for `limit` seconds ends the run with `EXIT_HUNG`.

    Nothing is watched in a job of one process: there is nobody to wait for.

    Attributes:
        iteration: tells how many iterations are done, for messages; the run sets it.

    Args:
        limit: seconds; a little less than the process groups' own time-out, whose error names no rank.
    """

    def __init__(self, pgs: ProcessGroups, limit: float) -> None:
        self.iteration: Callable[[], int] = lambda: 0
        self._limit = limit
        self._interval = min(5.0, limit / 10)
        self._board = Heartbeats(pgs, patience=max(3.0, 2 * self._interval)) if pgs.world_size > 1 else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beat = 0

    def __enter__(self) -> "Watchdog":
        if self._board is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._board is None:
            return
        try:
            if is_peer_loss(error):
                raise PeerLostError(self._blame(error)) from error
        finally:
            self._stop.set()
            # A store that does not answer does not keep a run that is done from ending.
            self._thread.join(3 * self._interval)

    def _watch(self) -> None:
        known, since = None, time.monotonic()
        while True:
            frames = _main_frames()
            signature = [(id(frame), frame.f_lasti) for frame in frames]
            if signature != known:
                known, since = signature, time.monotonic()
            stuck_for = time.monotonic() - since
            try:
                self._publish(frames, stuck_for)
                if stuck_for >= self._limit:
                    self._end(self._report())
            except RuntimeError:
                if stuck_for >= self._limit:
                    where = "rank 0, or the launcher that keeps the job's store, does not answer"
                    self._end(f"{_headline(stuck_for, self.iteration())}: {where}; this rank is at {_place(frames)}")
            if self._stop.wait(self._interval):
                return

    def _publish(self, frames: list[FrameType], stuck_for: float) -> None:
        self._beat += 1
        sight = Sight(
            self._beat,
            stuck_for,
            _place(frames),
            _is_waiting(frames),
            self.iteration(),
            socket.gethostname(),
            os.getpid(),
        )
        self._board.publish(vars(sight))

    def _report(self) -> str | None:
        """Message of what is wrong if this rank has to print it. The rank keeps publishing while it looks twice."""
        before = self._board.read_all()
        for _ in range(3):
            time.sleep(self._interval)
            self._publish(_main_frames(), self._limit)
        after = self._board.read_all()
        sights = [
            None if new is None or old is None or new["beat"] == old["beat"] else Sight(**new)
            for old, new in zip(before, after, strict=True)
        ]
        stuck = [rank for rank, sight in enumerate(sights) if sight is not None and sight.stuck_for >= self._limit / 2]
        return explain(sights, self._limit) if self._board.rank == min(stuck, default=self._board.rank) else None

    def _blame(self, error: BaseException) -> str:
        """Which ranks have gone: their processes on this machine, or those whose beats stand still."""
        words = str(error).strip().splitlines()[0].split("] ")[-1]
        try:
            lost = self._lost_ranks()
        except RuntimeError:
            lost = "rank 0, or the launcher that keeps the job's store,"
        if self._board.rank == 0:
            # Rank 0 may keep the store, in which the others still look up who has gone.
            time.sleep(min(2.0, 6 * self._interval))
        return (
            f"{lost} died or left after iteration {self.iteration()}, as rank {self._board.rank} noticed "
            f"({words}): look for that rank's own message, and start again from the last checkpoint"
        )

    def _lost_ranks(self) -> str:
        before = self._board.read_all()
        dead = [rank for rank, sight in enumerate(before) if sight is not None and _has_died(Sight(**sight))]
        if not dead:
            time.sleep(2.5 * self._interval)
            after = self._board.read_all()
            pairs = enumerate(zip(before, after, strict=True))
            dead = [rank for rank, (old, new) in pairs if old is None or old["beat"] == new["beat"]]
        return _ranks(dead) if dead else "a rank"

    def _end(self, report: str | None) -> None:
        if report is None:
            time.sleep(2 * self._interval)  # time for the rank that says it
        else:
            print(f"error: {report}", file=sys.stderr, flush=True)
            # Rank 0 may keep the store, in which the others still look up whose turn it is to report.
            time.sleep(6 * self._interval)
        os._exit(EXIT_HUNG)


def explain(sights: list[Sight | None], limit: float) -> str:
    """Which ranks are missing, and where the others are.

    Args:
        sights: of each rank; None for one that does not answer.
    """
    answering = {rank: sight for rank, sight in enumerate(sights) if sight is not None}
    usual = Counter(sight.place for sight in answering.values() if sight.is_waiting).most_common(1)
    silent = [rank for rank in range(len(sights)) if rank not in answering]
    missing = [f"rank {rank} (does not answer: stopped, dead or cut off)" for rank in silent]
    for rank, sight in answering.items():
        if not sight.is_waiting and usual and sight.place != usual[0][0]:
            missing.append(f"rank {rank} (at {sight.place})")
    iteration = max((sight.iteration for sight in answering.values()), default=0)
    blamed = f"missing: {', '.join(missing)}" if missing else "no rank is obviously missing"
    places: dict[str, list[int]] = {}
    for rank, sight in answering.items():
        places.setdefault(sight.place + (" waiting" if sight.is_waiting else ""), []).append(rank)
    seen = "; ".join(f"{_ranks(ranks)} at {place}" for place, ranks in places.items())
    return f"{_headline(limit, iteration)}: {blamed}. Of those that answer: {seen}"


def _has_died(sight: Sight) -> bool:
    """Whether a rank's process is gone; False if it runs on another machine."""
    if sight.host != socket.gethostname() or not sight.process:
        return False
    try:
        return psutil.Process(sight.process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _headline(seconds: float, iteration: int) -> str:
    return f"the run hangs: no progress for {seconds / 60:.2g} minutes after iteration {iteration}"


def _ranks(ranks: list[int]) -> str:
    shown = " ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}"


def _main_frames() -> list[FrameType]:
    """The main thread's stack, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(frames: list[FrameType]) -> str:
    """The innermost line of ours."""
    for frame in frames:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.startswith(f"{_PACKAGE}parallel"):
            return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
    return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno} {frames[0].f_code.co_name}" if frames else "nowhere"


def _is_waiting(frames: list[FrameType]) -> bool:
    return any(part in frame.f_code.co_filename for frame in frames for part in _COLLECTIVES)
