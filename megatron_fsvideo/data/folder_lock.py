"""One writer for a folder: a lock file that names its holder, and that the next one takes over when the holder is gone.

    FOLDER/.lock.json      {"host": "node7", "process": 4711, "since": "2026-01-31 12:00:00", "purpose": "...", ...}

On the same machine the holder's process says whether it lives. From another machine it cannot be seen: a living holder
touches the file every few seconds.
"""

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

LOCK_FILE = ".lock.json"
_BEAT_SECONDS = 10.0
# A holder that misses this many beats is gone.
_BEATS = 3


class FolderLockedError(ValueError):
    """Another process writes into the folder. The message is one line that names it."""


class FolderLock:
    """The right to write into a folder; for one process of a job.

    Args:
        purpose: what the holder does, for the message to others.
        rank: of the processes that share the folder; each has a lock of its own. The same rank of another job is
            refused, and every job has a rank 0.
        beat: seconds between two touches of the file.

    Attributes:
        was_abandoned: the holder before was gone without letting the folder go: it was killed.
    """

    def __init__(self, folder: Path, purpose: str, rank: int = 0, *, beat: float = _BEAT_SECONDS) -> None:
        self.path = folder / (f".lock.{rank}.json" if rank else LOCK_FILE)
        self._beat = beat
        self.was_abandoned = False
        self._stop = threading.Event()
        self._mine = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": psutil.Process().create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "purpose": purpose,
            "token": secrets.token_hex(8),
        }

    def acquire(self) -> None:
        """Make the folder and lock it. The lock of a holder that is gone is taken over, which is said in one line.

        Raises:
            FolderLockedError: the holder is alive. OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create():
            holder = _read(self.path)
            if _is_same_process(holder, self._mine):
                self._mine = holder
            elif self._is_alive(holder):
                raise FolderLockedError(
                    f"{self.path.parent} is in use by {_spell(holder)}: two would overwrite each other's files; wait "
                    f"for it, stop it, or use another folder (remove {self.path} if you know that it has ended)"
                )
            else:
                self._take_over(holder)
        threading.Thread(target=self._keep_alive, name="folder lock", daemon=True).start()
        atexit.register(self.release)

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Make sure that the lock is still this process's, before something is overwritten.

        Raises:
            FolderLockedError: another process has taken it over, because this one was stopped for too long.
        """
        if not self.path.exists() and self._create():  # the folder was removed meanwhile
            return
        holder = _read(self.path)
        if holder.get("token") != self._mine["token"]:
            raise FolderLockedError(
                f"{self.path.parent} was taken over by {_spell(holder)}: this process stops writing"
            )

    def release(self) -> None:
        """Let others write; a lock that is no longer this process's is left alone."""
        self._stop.set()
        if _read(self.path).get("token") == self._mine["token"] and self._mine["process"] == os.getpid():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(self._mine, file)
        except FileExistsError:
            return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{self._mine['token']}")
        temporary.write_text(json.dumps(self._mine), encoding="utf-8")
        temporary.replace(self.path)
        time.sleep(0.05)  # two may have seen that the holder is gone: the last to write has the lock
        self.check()
        self.was_abandoned = True
        print(f"note: {self.path.parent} was locked by {_spell(holder)}, which is gone", file=sys.stderr, flush=True)

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self._mine["host"]:
            return _process_lives(holder)
        before = _touched(self.path)
        deadline = time.monotonic() + _BEATS * self._beat
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._beat / 5))
            if _touched(self.path) != before:
                return True
        return False

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._beat):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                continue  # `check` makes it anew


def _read(path: Path) -> dict[str, Any]:
    """Content of a lock file; empty if there is none or its writer was killed."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_same_process(holder: dict[str, Any], mine: dict[str, Any]) -> bool:
    return all(holder.get(name) == mine[name] for name in ("host", "process", "started"))


def _process_lives(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["process"]))
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _spell(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    process, host, purpose, since = (holder.get(name) for name in ("process", "host", "purpose", "since"))
    return f"process {process} on {host} ({purpose}, since {since})"
