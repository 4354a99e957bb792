"""The real Transformer Engine against torch's modules, FP8 against bf16: `-m gpu`, where there is such a machine."""

import ast
import functools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes" / "transformer_engine" / "pytorch"
FAKE_FILES = {"Linear": "linear.py", "LayerNorm": "norm.py", "DotProductAttention": "attention.py"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@functools.cache
def cases() -> dict[str, Any]:
    """From a process of its own: this one forks others, which CUDA does not survive."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.transformer_engine_cases"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_transformer_engine_equals_torchs_modules_to_bf16():
    found = cases()["te"]
    assert found["same_names"] and found["finite"]
    assert found["output"] < 0.03 and found["gradients"] < 0.06
    assert cases()["same_checkpoint"]


def test_fp8_is_near_bf16():
    assert cases()["fp8"], "this device can do no FP8"
    for recipe, found in cases()["fp8"].items():
        assert found["finite"], recipe
        assert 1e-4 < found["output"] < 0.2 and found["gradients"] < 0.4, f"{recipe}: {found}"


def test_recomputation_in_fp8_is_in_fp8():
    """Not to the bit: attention's backward adds in any order. In bf16 the distance would be that of FP8 from bf16."""
    for name, found in cases()["recomputed"].items():
        fp8 = cases()["fp8"][name.split()[0]]
        assert found["output"] < 1e-3 and found["gradients"] < 0.2 * fp8["gradients"], name


def test_training_lowers_the_loss():
    for name, losses in cases()["losses"].items():
        assert losses[-1] < 0.9 * losses[0], f"{name}: {losses}"


def test_the_local_backends_attention_is_attention():
    found = cases()["attention"]
    assert found["distance"] < 0.01, found


@pytest.mark.parametrize("name", ["Linear.__init__", "LayerNorm.__init__", "DotProductAttention.__init__"])
def test_the_stand_in_for_cpu_tests_has_the_real_signatures(name):
    owner, function = name.split(".")
    body = ast.parse((FAKES / FAKE_FILES[owner]).read_text()).body
    (class_node,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == owner)
    (node,) = (node for node in class_node.body if isinstance(node, ast.FunctionDef) and node.name == function)
    parameters = [argument.arg for argument in node.args.args]
    real = cases()["signatures"][name]
    assert set(parameters) <= set(real)
