"""Which parameters decay and at which rate they learn, the schedule, and AdamW and Muon against plain torch."""

import math

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, OptimizerConfig, build_job
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.optim.optimizer import build_optimizer, wrap_ddp
from megatron_fsvideo.optim.schedule import set_learning_rates
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from tests.parallel.harness import run_workers


def rates(iterations, **settings):
    """Learning rate of each iteration of a run, of a group whose peak is 1."""
    optimizer = OptimizerConfig(lr=1.0, **settings)
    groups_of_run = [{"max_lr": 1.0, "min_lr": optimizer.min_lr}]
    values = []
    for iteration in range(1, iterations + 1):
        set_learning_rates(groups_of_run, iteration, iterations, optimizer)
        values.append(groups_of_run[0]["lr"])
    return values


def test_warmup_then_constant_then_cosine():
    values = rates(100, lr_warmup_iters=10, lr_decay_style="cosine", lr_decay_start=0.5, min_lr=0.1)
    assert values[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert values[9:50] == [1.0] * 41
    for k in range(51, 101):
        assert values[k - 1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 50) / 50)))


def test_the_first_step_learns_and_the_last_has_the_least_rate():
    assert rates(8, lr_warmup_iters=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for style in ("linear", "cosine"):
        for warmup in (0, 3, 7, 8, 100):
            values = rates(8, lr_warmup_iters=warmup, lr_decay_style=style, min_lr=0.3)
            assert values[0] > 0 and values[-1] == 0.3, (style, warmup)


def test_constant_and_linear():
    assert rates(8) == [1.0] * 8
    assert rates(10, lr_decay_style="linear") == pytest.approx([1 - k / 10 for k in range(1, 11)])


def test_more_warmup_than_iterations():
    assert rates(4, lr_warmup_iters=100) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(1, lr_warmup_iters=100) == [1.0]


def test_each_group_moves_between_its_own_rates():
    found = [{"max_lr": 1.0, "min_lr": 0.1}, {"max_lr": 10.0, "min_lr": 1.0}]
    set_learning_rates(found, 5, 10, OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear"))
    assert [group["lr"] for group in found] == pytest.approx([0.55, 5.5])


def built(settings, **changes):
    """(model, optimizer) of the debug preset, one process."""
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"] | changes)
    pgs = groups.initialize(DiTParallelConfig())
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    model = build_dit(job.model, job.parallel, pgs, params_dtype=dtype)
    wrapped = wrap_ddp([model], model.config, job.parallel, pgs)
    rules = dit_parameter_rules([model], settings.router_lr_mult)
    return model, build_optimizer(wrapped, settings, rules, pgs)


def group_of_each_parameter(kind):
    settings = OptimizerConfig(optimizer=kind, lr=0.5, muon_lr=0.25, weight_decay=1.0, router_lr_mult=10.0)
    model, optimizer = built(settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for index, link in enumerate(optimizer.chained_optimizers):
        for group in link.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found, "a parameter is in two groups"
                found[names[id(parameter)]] = index, group["weight_decay"], group["max_lr"]
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_groups(kind):
    found = run_workers(group_of_each_parameter, 1, kind)[0]
    routers = [value for name, value in found.items() if ".router." in name]
    assert routers and all(decay == 0.0 and rate == pytest.approx(5.0) for _, decay, rate in routers)
    for name, (_, decay, rate) in found.items():
        undecayed = name.endswith(("bias", "scale_shift_table")) or "norm" in name or ".router." in name
        assert decay == (0.0 if undecayed else 1.0), name
        matrix = ".layers." in name and name.endswith(".weight") and "norm" not in name and "router" not in name
        if kind == "muon" and matrix:
            assert rate == 0.25, name
        elif ".router." not in name:
            assert rate == 0.5, name


def first_step(kind):
    """Each parameter before and after one step with a known gradient."""
    settings = OptimizerConfig(optimizer=kind, lr=1e-2, muon_lr=0.02, weight_decay=0.1, clip_grad=0, router_lr_mult=1)
    model, optimizer = built(settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.main_grad.copy_(gradients[name])
    with megatron_on_cpu():
        optimizer.step()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return before, gradients, after


def test_adamw_equals_torch():
    before, gradients, after = run_workers(first_step, 1, "adam")[0]
    for name, weight in before.items():
        undecayed = name.endswith(("bias", "scale_shift_table")) or "norm" in name or ".router." in name
        parameter = torch.nn.Parameter(weight.clone())
        reference = torch.optim.AdamW([parameter], 1e-2, (0.9, 0.95), 1e-8, 0.0 if undecayed else 0.1)
        parameter.grad = gradients[name]
        reference.step()
        torch.testing.assert_close(after[name], parameter.detach(), msg=name)


def test_muon_moves_matrices_by_orthogonal_steps():
    before, _, after = run_workers(first_step, 1, "muon")[0]
    name = "block.layers.0.mlp.linear_fc1.weight"
    rows, columns = before[name].shape
    step = (before[name] * (1 - 0.02 * 0.1) - after[name]) / (0.02 * max(1, rows / columns) ** 0.5)
    singular = torch.linalg.svdvals(step)
    assert 0.5 < singular.min() and singular.max() < 1.35
