"""Which parameters decay and at which rate they learn, the schedule, and AdamW and Muon against plain torch."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, OptimizerConfig, TrainingConfig, build_job
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.training.optimizer import LateDecayScheduler, build_optimizer, decayed_lr, wrap_ddp
from tests.parallel.harness import run_workers

BATCH = 4


def rates(iterations, steps=None, **settings):
    """Learning rate of each of the first `steps` (all) iterations of a run, and the scheduler."""
    group = {"max_lr": 1.0, "min_lr": settings.get("min_lr", 0.0), "lr": 0.0, "wd_mult": 1.0}
    fake = SimpleNamespace(param_groups=[group])
    training = TrainingConfig(global_batch_size=BATCH, train_iters=iterations)
    scheduler = LateDecayScheduler(fake, OptimizerConfig(lr=1.0, **settings), training)
    values = []
    for _ in range(iterations if steps is None else steps):
        values.append(group["lr"])
        scheduler.step(increment=BATCH)
    return values, scheduler


def test_warmup_then_constant_then_cosine():
    values, _ = rates(100, lr_warmup_iters=10, lr_decay_style="cosine", lr_decay_start=0.5, min_lr=0.1)
    assert values[:11] == pytest.approx([k / 10 for k in range(11)])
    assert values[10:51] == pytest.approx([1.0] * 41)
    for k in range(50, 100):
        assert values[k] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 50) / 50)))


def test_constant_and_linear():
    assert rates(8)[0] == pytest.approx([1.0] * 8)
    assert rates(10, lr_decay_style="linear")[0] == pytest.approx([1 - k / 10 for k in range(10)])


def test_more_warmup_than_iterations():
    values, _ = rates(4, lr_warmup_iters=100, lr_decay_style="cosine")
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_resume_and_a_longer_run():
    values, _ = rates(20, lr_decay_style="linear")
    _, half = rates(10, lr_decay_style="linear")
    _, longer = rates(20, steps=0, lr_decay_style="linear")
    # Ten iterations of a ten-iteration run, continued to twenty: this run's schedule holds.
    longer.load_state_dict(half.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(values[10])


def test_unknown_style():
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        decayed_lr("square", 0.5, 1.0, 0.0)


def built(settings, **changes):
    """(model, wrapped, optimizer) of the debug preset, one process."""
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"] | changes)
    pgs = groups.initialize(DiTParallelConfig())
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    model = build_dit(job.model, job.parallel, pgs, params_dtype=dtype)
    wrapped = wrap_ddp(model, job.parallel, pgs)
    return model, wrapped, build_optimizer(wrapped, settings, job.parallel, job.training, pgs)


def group_of_each_parameter(kind):
    settings = OptimizerConfig(optimizer=kind, lr=0.5, muon_lr=0.25, router_lr_mult=10.0)
    model, _, optimizer = built(settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for index, link in enumerate(optimizer.chained_optimizers):
        for group in link.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found, "a parameter is in two groups"
                found[names[id(parameter)]] = index, group["wd_mult"], group["max_lr"]
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
    model, wrapped, optimizer = built(settings)
    scheduler = LateDecayScheduler(optimizer, settings, TrainingConfig())
    assert scheduler.num_steps == 0
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
