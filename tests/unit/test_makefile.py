"""`make` with the Pythons that a machine has: it takes one that works, or says in one line what to install."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")
# Answers the Makefile's question about its version, and notes how it is called otherwise.
STUB = """#!/bin/sh
if [ "$1" = -c ]; then exit {code}; fi
echo "{name} $*" >> {log}
exit 7
"""


def make(folder: Path, pythons: dict[str, bool], *words: str) -> subprocess.CompletedProcess:
    """Run make where only these Pythons are on the path; whether each is of a supported version."""
    for name, is_supported in pythons.items():
        stub = folder / name
        stub.write_text(STUB.format(code=0 if is_supported else 1, name=name, log=folder / "log"))
        stub.chmod(0o755)
    command = [MAKE, "-C", ROOT, f"VENV={folder}/venv", *words, "lint"]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True)


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_make_says_what_to_install_where_python_is_too_new(tmp_path):
    for words in ((), ("PYTHON=python3",)):
        done = make(tmp_path, {"python3": False}, *words)
        lines = [line for line in done.stderr.splitlines() if "directory" not in line]
        assert done.returncode and len(lines) == 1 and "Python 3.11 or 3.12 is needed" in lines[0], done.stderr
        assert "uv python install 3.12" in lines[0] and "$(uv python find 3.12)" in lines[0]
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [({"python3": False, "python3.12": True}, "python3.12"), ({"python3": True}, "python3")],
)
def test_make_takes_a_python_that_works(tmp_path, pythons, chosen):
    make(tmp_path, pythons)
    assert (tmp_path / "log").read_text() == f"{chosen} -m venv {tmp_path}/venv\n"
