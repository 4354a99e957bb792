"""Every parameter of every network has a rule, and the rules say what is meant."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_fsvideo.config import (
    DIT_PRESETS,
    DiTJob,
    DiTParallelConfig,
    LatentUpsamplerConfig,
    OptimizerConfig,
    build_job,
)
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.models.latent_upsampler import LatentUpsampler
from megatron_fsvideo.models.parameter_rules import DECAYED, MATRIX, UNDECAYED
from megatron_fsvideo.optim.optimizer import parameter_groups
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers
from tests.unit.fsae_fixtures import config

UPSAMPLER = {"latent_channels": 4, "mid_channels": 32, "blocks": (1, 1)}
CONVOLUTIONAL = {
    "causal": lambda: FSAE(config()),
    "standard": lambda: FSAE(config("standard")),
    "lite": lambda: FSAE(config("lite")),
    "discriminator": lambda: Discriminator(width=4, num_scales=2, num_layers=1),
    "upsampler": lambda: LatentUpsampler(LatentUpsamplerConfig(**UPSAMPLER, norm="group", time_padding="zero")),
    "upsampler_pixel_norm": lambda: LatentUpsampler(LatentUpsamplerConfig(**UPSAMPLER)),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_dense_kernels_decay_and_take_muon(name):
    network = CONVOLUTIONAL[name]()
    rules = fsae_parameter_rules(network)
    assert rules.keys() == set(network.parameters())
    for parameter_name, parameter in network.named_parameters():
        grouped = "depthwise" in parameter_name or "scale_pointwise" in parameter_name
        is_kernel = parameter.ndim > 1 and not grouped
        assert rules[parameter] == (MATRIX if is_kernel else UNDECAYED), parameter_name
    assert MATRIX in rules.values()


def test_a_parameter_without_a_rule_is_an_error():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="parameter 1.weight of Sequential has no rule"):
        fsae_parameter_rules(network)


def rules_of_the_dit(changes):
    """Name -> rule, as plain data."""
    pgs = groups.initialize(DiTParallelConfig())
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"])
    model = build_dit(replace(job.model, **changes), job.parallel, pgs, params_dtype=torch.float32)
    rules = dit_parameter_rules([model], 7.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert rules.keys() == names.keys()
    model.block.new_scale = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="parameter block.new_scale of DiTModel has no rule"):
        dit_parameter_rules([model], 7.0)
    groups.shutdown()
    return {name: (rules[p].decays, rules[p].takes_muon, rules[p].lr_mult) for p, name in names.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_memory": False}, {"image_embed_dim": 8, "text_embed_dim": 0}, {"patch_size": (1, 2, 2)}],
    ids=["memory", "without_memory", "image", "patch2"],
)
def test_every_parameter_of_the_dit_has_a_rule(changes):
    found = run_workers(rules_of_the_dit, 1, changes)[0]
    for name, rule in found.items():
        if ".router." in name:
            expected = UNDECAYED.learning(7.0)
        elif name.endswith(("bias", "scale_shift_table")) or "norm" in name:
            expected = UNDECAYED
        else:
            expected = MATRIX if ".layers." in name else DECAYED
        assert rule == (expected.decays, expected.takes_muon, expected.lr_mult), name
    assert any(".router." in name for name in found) == ("layer_memory" not in changes)


def test_groups_carry_decay_and_rates():
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    rules = {first: UNDECAYED, second: DECAYED, third: UNDECAYED.learning(3.0)}
    settings = OptimizerConfig(lr=0.5, min_lr=0.1, weight_decay=0.2)
    found = {group["params"][0]: group for group in parameter_groups([first, second, third], rules, settings, 2.0)}
    assert [found[p]["weight_decay"] for p in (first, second, third)] == [0.0, 0.2, 0.0]
    assert [found[p]["max_lr"] for p in (first, second, third)] == [2.0, 2.0, 6.0]
    assert [found[p]["min_lr"] for p in (first, second, third)] == pytest.approx([0.4, 0.4, 1.2])
