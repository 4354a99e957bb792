"""A loss or gradient that is not finite changes nothing, on any rank; a finite one is Megatron's own step."""

import math

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, OptimizerConfig, build_job
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.optim.optimizer import build_optimizer, step_if_finite, wrap_ddp
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from tests.parallel.harness import run_workers

CASES = {
    "adam": ("adam", {}),
    "bf16": ("adam", {"bf16": True}),
    "distributed": ("adam", {"use_distributed_optimizer": True}),
    "muon": ("muon", {}),
    "muon_distributed": ("muon", {"use_distributed_optimizer": True}),
    "muon_bf16_distributed": ("muon", {"bf16": True, "use_distributed_optimizer": True}),
}


def build(kind, flags, pgs):
    settings = OptimizerConfig(optimizer=kind, lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"] | flags)
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    model = build_dit(job.model, job.parallel, pgs, params_dtype=dtype)
    wrapped = wrap_ddp([model], model.config, job.parallel, pgs)
    return model, build_optimizer(wrapped, settings, dit_parameter_rules([model], settings.router_lr_mult), pgs)


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def two_steps_with_wrong_ones_between(kind, flags, world_size):
    """Weights after the same two steps: Megatron's, and ours with three skipped ones between; what was reported."""
    pgs = groups.initialize(DiTParallelConfig())
    model, optimizer = build(kind, flags, pgs)
    start = weights_of(model)
    with megatron_on_cpu():
        for seed in (1, 2):
            fill_gradients(model, seed)
            norm = optimizer.step()[1]
    expected = weights_of(model)

    model, optimizer = build(kind, flags, pgs)
    assert all(torch.equal(weights_of(model)[name], weight) for name, weight in start.items())
    fill_gradients(model, 1)
    reported = [step_if_finite(optimizer, 1.0, pgs)]
    between = weights_of(model)
    for wrong in (math.nan, math.inf):
        fill_gradients(model, 3)
        if pgs.rank == world_size - 1:  # what one rank alone has seen
            for parameter in model.parameters():
                parameter.main_grad.view(-1)[0] = wrong
        reported.append(step_if_finite(optimizer, 1.0, pgs))
    fill_gradients(model, 3)
    reported.append(step_if_finite(optimizer, math.nan if pgs.rank == 0 else 1.0, pgs))
    assert all(torch.equal(weights_of(model)[name], weight) for name, weight in between.items())
    fill_gradients(model, 2)
    reported.append(step_if_finite(optimizer, 1.0, pgs))
    return expected, weights_of(model), [has_stepped for _, has_stepped in reported], reported[-1][0] == norm


@pytest.mark.parametrize(("kind", "flags"), CASES.values(), ids=CASES)
def test_what_is_skipped_leaves_no_trace(kind, flags):
    for expected, found, stepped, same_norm in run_workers(two_steps_with_wrong_ones_between, 2, kind, flags, 2):
        assert stepped == [True, False, False, False, True]
        assert same_norm
        assert all(torch.equal(expected[name], found[name]) for name in expected)
