"""Triton's kernels of layer memory on a GPU, at the 14B model's sizes: `-m gpu`. Speed is the benchmark's business."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.gpu.mixing_checks import CHECKS, DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["raw", "normalized"])
@pytest.mark.parametrize("name", CHECKS)
def test_kernels(name, norm, dtype):
    """In a process of its own: this one forks others, which CUDA does not survive."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.mixing_checks", name, norm, dtype],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
