"""Transformer Engine's backend through megatron-core's own wrappers, on a stand-in for the library (tests/fakes).

What it proves: which modules a layer is made of, how they are built, who exchanges what with whom, marks, names, FP8's
reach and its padding. What it cannot prove: Transformer Engine's arithmetic; that is tests/gpu's.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@functools.cache
def run_cases(kind: str, *arguments: str) -> dict[str, Any]:
    """The answer of transformer_engine_cases.py, from a process that finds the stand-in."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.transformer_engine_cases", kind, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests" / "fakes"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    ["alone", "tp2", "tp2_sp", "pp2_recompute", "tp2_sp_cp2_padded", "cp2_p2p", "cp2_all_gather", "cp4_a2a+p2p"],
)
def test_a_layout_equals_torchs_modules_in_one_process(name):
    found = run_cases("layouts")[name]
    assert found["same_names"]
    for what in ("losses", "norms", "gradients"):
        assert found[what] < 1e-5, f"{what}: {found[what]:.1e}"
    assert found["weights"] < 1e-4


def test_checkpoints_go_from_one_backend_to_the_other_and_hold_no_pickled_state(tmp_path):
    """The stand-in's `_extra_state` is a pickle that raises when it is read, in whatever file it came."""
    runs = run_cases("checkpoints", str(tmp_path))
    assert len(runs["local"]) == 6 and runs["local"][3] != runs["local"][5]
    for name in ("local_then_te", "te_then_local"):
        assert runs[name] == pytest.approx(runs["local"], rel=1e-5)


def test_fp8_reaches_the_linears_of_the_layers_and_stays_near_bf16():
    runs = run_cases("fp8")
    for name, run in runs.items():
        # Four in self-attention, six in cross-attention, two in the feed-forward layer; of four layers.
        assert run["linears"] == 48
        assert run["linears_in_fp8"] == (0 if name == "bf16" else 48)
        assert run["losses"] == pytest.approx(runs["bf16"]["losses"], rel=0.02)
        assert (0.0 if name == "bf16" else 0.01) <= run["from_bf16"] < 0.3


@pytest.mark.parametrize("name", ["fp8_full", "fp8_selective"])
def test_recomputation_in_fp8_is_in_fp8(name):
    assert run_cases("fp8")[name]["from_fp8"] == 0.0


def test_fp8_weights_that_are_kept_between_micro_batches_are_renewed_after_a_step():
    runs = run_cases("fp8")
    assert runs["fp8_weights_not_kept"]["from_fp8"] == 0.0
    assert runs["fp8"]["losses"] == runs["fp8_weights_not_kept"]["losses"]
