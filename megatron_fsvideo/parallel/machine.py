"""Hardware, versions and command of a measurement, without which it is worthless."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "megatron-core", "diffusers", "triton", "transformer-engine", "flash-attn")


def describe_measurement() -> dict[str, Any]:
    """Hardware, versions, commit, command and date, as JSON-able values."""
    return {
        "device": device_name(),
        "cpu": _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The accelerator's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with + if files that git knows were changed; None outside a checkout."""
    answers = [
        subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    if any(answer.returncode for answer in answers):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")
