"""When a run leaves before its last iteration: a signal asks it to (SLURM, spot machines), or its time is up."""

import signal
import time
from types import FrameType, TracebackType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class ExitRequest:
    """Within this context SIGTERM and SIGUSR1 are noted instead of ending the process.

    One rank may know what the others do not: `flags` is what this one knows, and what all ranks make of it together
    (the flags that any of them has) is for `explain`.

    Args:
        handle_signals: False leaves the signals alone: they end the process.
        limit_minutes: age of this process at which it should leave; None for no limit.
    """

    def __init__(self, handle_signals: bool, limit_minutes: float | None) -> None:
        self._signals = SIGNALS if handle_signals else ()
        self._limit_minutes = limit_minutes
        self._received: set[int] = set()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "ExitRequest":
        self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def flags(self) -> list[bool]:
        """Whether this process has received each of `SIGNALS`, and whether its time is up."""
        limit = self._limit_minutes
        return [number in self._received for number in SIGNALS] + [limit is not None and age_minutes() >= limit]

    def explain(self, flags: list[bool]) -> str | None:
        """Why to leave, or None to stay."""
        reasons = [signal.Signals(number).name for number in SIGNALS]
        reasons.append(f"exit_duration_in_mins {self._limit_minutes} is over")
        return " and ".join(reason for reason, flag in zip(reasons, flags, strict=True) if flag) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)


def age_minutes() -> float:
    """How long this process has lived: start-up and loading count, as they do for a scheduler."""
    return (time.time() - psutil.Process().create_time()) / 60
