"""Ends a run before its last iteration, at a signal (SLURM, spot machines, Ctrl-C) or a time limit."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Exit code that a shell reports for a program that SIGINT ended.
EXIT_INTERRUPTED = 130
# torchrun forwards a SIGINT that the terminal has already sent to its ranks.
_SAME_INTERRUPT_SECONDS = 1.0


class ExitRequest:
    """Context in which SIGTERM, SIGUSR1 and SIGINT are recorded instead of ending the process; a second SIGINT ends it.

    A signal may reach only some ranks. `flags` are the flags of this rank; `explain` takes those that any rank has set,
    which are equal on all ranks.

    Args:
        handle_signals: False leaves the signals' default effect, which ends the process.
        limit_minutes: age of this process at which the run should leave; None for no limit.
    """

    def __init__(self, handle_signals: bool, limit_minutes: float | None) -> None:
        self._signals = SIGNALS if handle_signals else ()
        self._limit_minutes = limit_minutes
        self._received: set[int] = set()
        self._previous: dict[int, object] = {}
        self._interrupts: _Interrupts | None = None

    def __enter__(self) -> "ExitRequest":
        self._previous = {number: signal.signal(number, self._note) for number in self._signals}
        self._interrupts = _Interrupts() if self._signals else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._interrupts is not None:
            self._interrupts.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def flags(self) -> list[bool]:
        """Whether this process has received each of `SIGNALS`, and whether its time is up."""
        limit = self._limit_minutes
        return [number in self._received for number in SIGNALS] + [limit is not None and age_minutes() >= limit]

    def explain(self, flags: list[bool]) -> str | None:
        """The reason to leave, or None to continue."""
        reasons = [signal.Signals(number).name for number in SIGNALS]
        reasons.append(f"exit_duration_in_mins {self._limit_minutes} is over")
        return " and ".join(reason for reason, flag in zip(reasons, flags, strict=True) if flag) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)


class _Interrupts:
    """Ends the process at a second SIGINT, even while the main thread waits in a collective and handles no signal."""

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="interrupts", daemon=True).start()

    def close(self) -> None:
        """Restore the handling of signals."""
        signal.set_wakeup_fd(self._previous)
        self._writing.close()

    def _read(self) -> None:
        first = None
        while received := self._reading.recv(1):
            if received[0] != signal.SIGINT:
                continue
            if first is None:
                first = time.monotonic()
                text = "interrupted: saving after this iteration; interrupt again to leave at once"
                print(text, file=sys.stderr, flush=True)
            elif time.monotonic() - first > _SAME_INTERRUPT_SECONDS:
                print("error: interrupted twice: left without saving", file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
        self._reading.close()


def age_minutes() -> float:
    """Minutes since this process started, including start-up and loading, as a scheduler counts them."""
    return (time.time() - psutil.Process().create_time()) / 60
