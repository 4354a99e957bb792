"""Commands that run one after the other and are not repeated: the drivers of the examples.

A finished phase is skipped as long as its command, its inputs and all phases before it are the same. Where they are
not, what it made before is removed and it runs anew: a training must not continue from that of other films.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_fsvideo.data.outputs import try_folder, write_json
from megatron_fsvideo.data.text_files import read_object

PHASES_FILE = "phases.json"
_SAMPLE = 1 << 16


class Phases:
    """Runs commands in order, prints and times them, and remembers in a file which are done.

    Args:
        folder: where phases.json lies.
        num_processes: of a command that begins with `torchrun`; they share the machine's threads.
    """

    def __init__(self, folder: Path, num_processes: int = 1) -> None:
        try_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / PHASES_FILE
        self.num_processes = num_processes
        self._done = read_object(self.path) if self.path.exists() else {}
        self._key = ""

    def run(self, name: str, *command: str | Path, inputs: Sequence[Path] = (), outputs: Sequence[Path] = ()) -> None:
        """Run one phase; end the program with its exit code if it fails.

        Args:
            command: `python` or `torchrun`, a script and its flags.
            inputs: files and folders that no phase before makes.
            outputs: files and folders that it makes.
        """
        words = [str(word) for word in command]
        self._key = _digest(self._key, words, [_identity(path) for path in inputs])
        known = self._done.get(name)
        is_same = isinstance(known, dict) and known.get("key") == self._key
        if is_same and known["seconds"] is not None:
            print(f"\n== {name}: done before, in {known['seconds']:.0f} s", flush=True)
            return
        # A folder that this driver has not made before is not its to remove.
        if known is not None and not is_same:
            for path in outputs:
                _remove(path)
        print(f"\n== {name}\n$ {shlex.join(words)}", flush=True)
        # Written first: an interrupted phase is continued by the same command, and by no other.
        self._done[name] = {"key": self._key, "seconds": None}
        write_json(self.path, self._done)
        started = time.monotonic()
        if code := subprocess.run(_with_this_python(words), env=self._environment(words)).returncode:
            raise SystemExit(f"stopped in phase {name} (exit code {code}); run it again to go on from there")
        self._done[name]["seconds"] = round(time.monotonic() - started, 1)
        write_json(self.path, self._done)

    def _environment(self, words: list[str]) -> dict[str, str]:
        cores = os.cpu_count() or 1
        threads = max(1, cores // self.num_processes) if words[0] == "torchrun" else cores
        return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def read_seconds(folder: Path) -> dict[str, float]:
    """Seconds that each finished phase took.

    Raises:
        TextError: phases.json is missing or damaged.
    """
    phases = read_object(folder / PHASES_FILE)
    return {name: phase["seconds"] for name, phase in phases.items() if isinstance(phase, dict) and phase["seconds"]}


def _with_this_python(words: list[str]) -> list[str]:
    """`python` and `torchrun` of the environment that runs this script."""
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*launchers[words[0]], *words[1:]]


def _identity(path: Path) -> list[tuple[str, int, str]]:
    """Name, size and a digest of the first and the last bytes of a file, or of every file below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file.relative_to(path)), file.stat().st_size, _ends(file)) for file in files]


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_SAMPLE))
        file.seek(max(0, path.stat().st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
