"""The kernels of layer memory against fp64: plain torch's here, Triton's in its interpreter (`triton_interpreter`)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.kernels import MixSettings, torch_mixing
from tests.unit.mixing_cases import EPSILON, check, make_case, relative
from tests.unit.triton_interpreter import CHECKS


@pytest.mark.parametrize("norms_states", [False, True])
@pytest.mark.parametrize("num_states", range(2, 41))
def test_torch_kernels_equal_autograd_in_fp64(num_states, norms_states):
    check(torch_mixing, make_case(num_states), norms_states, 2e-5)


@pytest.mark.parametrize("norms_states", [False, True])
def test_torch_kernels_are_exact_in_fp64_and_round_once_in_bf16(norms_states):
    case = [tensor if isinstance(tensor, list) else tensor.double() for tensor in make_case(5)]
    case[1] = [state.double() for state in case[1]]
    check(torch_mixing, case, norms_states, 1e-12)
    check(torch_mixing, make_case(5, dtype=torch.bfloat16), norms_states, 8e-3)


@pytest.mark.parametrize("norms_states", [False, True])
def test_pull_adds_many_reads_and_other_gradients(norms_states):
    """Three layers read X_1, and two gradients arrive from elsewhere."""
    settings = MixSettings(norms_states, EPSILON)
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(5, 2, 16, generator=generator)
    reads = [
        (torch.rand(5, 2, number, generator=generator), torch.randn(5, 2, 16, generator=generator))
        for number in (4, 3, 2)
    ]
    others = [torch.randn(5, 2, 16, generator=generator) for _ in range(2)]
    x = state.double().requires_grad_()
    source = torch.nn.functional.layer_norm(x, (16,), eps=EPSILON) if norms_states else x
    sum(((w[..., 1, None] * source) * g).sum() for w, g in reads).backward()
    expected = x.grad + others[0] + others[1]
    assert relative(torch_mixing.pull(others, 1, reads, state, settings), expected) < 1e-6


def test_the_mix_is_local_to_the_token():
    logits, states, shift, scale, _ = make_case(3)
    settings = MixSettings(False, EPSILON)
    before = torch_mixing.mix(logits, states, shift, scale, settings).output
    states[1] = states[1].clone()
    states[1][4, 1] += torch.linspace(-1, 1, 24)
    changed = (torch_mixing.mix(logits, states, shift, scale, settings).output != before).any(-1)
    assert changed.nonzero().tolist() == [[4, 1]]


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_module(*words, **environment):
    """In a process of its own: Triton reads the variables when it is imported, which Megatron may have done here."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("norms_states", ["raw", "normalized"])
@pytest.mark.parametrize("name", CHECKS)
def test_triton_kernels(name, norms_states):
    run_module("tests.unit.triton_interpreter", name, norms_states, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("norms_states", ["raw", "normalized"])
def test_triton_kernels_load_whole_words_ahead_on_an_h100(norms_states, tmp_path):
    run_module("tests.unit.triton_compilation", norms_states, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
