"""Programs timed against one another: each in a process of its own, which computes only when it is its turn."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ANSWER = "BENCHMARK "


class Contender:
    """A contender's process, seen from outside: the running script again, with `--worker name`.

    Attributes:
        facts: its first answer, given when it is ready.

    Raises:
        ValueError: the process ended before it answered.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, "-W", "ignore::UserWarning", *sys.argv, "--worker", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer to one line; it computes only meanwhile.

        Raises:
            ValueError: the process ended instead.
        """
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise ValueError(f"the process of {self.name} ended with exit code {self._process.wait()}; its error is above")


def answer(values: dict[str, Any]) -> None:
    """Print a contender's result from its process."""
    print(ANSWER + json.dumps(values), flush=True)


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> dict[str, float]:
    """Seconds by round over others: the ratio of the medians, and the least and greatest of a round's medians.

    A ratio whose rounds differ much was measured on a busy machine.
    """
    by_round = [statistics.median(a) / statistics.median(b) for a, b in zip(above, below, strict=True)]
    whole = statistics.median(s for turn in above for s in turn) / statistics.median(s for turn in below for s in turn)
    return {"median": whole, "min": min(by_round), "max": max(by_round)}
