"""FLOP counts: those behind the paper's Table 4, and torch's own counter on a real model."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig
from megatron_fsvideo.models.flops import (
    Rows,
    forward_flops,
    hardware_flops,
    peak_tflops,
    total,
    training_flops,
)

PAPER = DiTConfig()
WAN = DiTConfig(latent_channels=16, patch_size=(1, 2, 2), layer_memory=False)


@pytest.mark.parametrize(
    ("model", "grid", "teraflops"),
    [
        (WAN, (21, 45, 80), 6540),
        (WAN, (31, 45, 80), 12945),
        (PAPER, (31, 6, 10), 51.8),
        (PAPER, (31, 8, 8), 55.2),
        (PAPER, (31, 12, 20), 231.2),
        (PAPER, (31, 11, 20), 208.9),
        (PAPER, (31, 16, 16), 249.8),
    ],
)
def test_table_of_the_specification(model, grid, teraflops):
    parts = forward_flops(model, Rows(grid[0] * grid[1] * grid[2]))
    assert total(parts) / 1e12 == pytest.approx(teraflops, rel=1e-3)


def test_parts_of_the_specification():
    base, refiner = (forward_flops(PAPER, Rows(tokens)) for tokens in (1860, 7440))
    linears = ("self_attention_linears", "cross_attention_linears", "feed_forward")
    assert sum(base[name] for name in linears) / 1e12 == pytest.approx(44.5, rel=1e-3)
    assert sum(refiner[name] for name in linears) / 1e12 == pytest.approx(177.9, rel=1e-3)
    assert base["context_linears"] / 1e12 == pytest.approx(3.225, rel=1e-3)
    assert round(refiner["self_attention"] / 1e12, 1) == 45.3
    memory = forward_flops(PAPER, Rows(1984))
    assert (memory["layer_memory_router"] + memory["layer_memory_mix"]) / 1e9 == pytest.approx(33.3, rel=1e-3)


def test_the_68_evaluations_of_table_4():
    base, refiner = (total(forward_flops(PAPER, Rows(tokens))) for tokens in (1860, 7440))
    assert 60 * base / 1e15 == pytest.approx(3.106, rel=1e-3)
    assert 8 * refiner / 1e15 == pytest.approx(1.850, rel=1e-3)
    seconds = (60 * base + 8 * refiner) / (1e12 * peak_tflops("NVIDIA H100 80GB HBM3"))
    assert seconds == pytest.approx(5.01, rel=1e-3)
    assert seconds / 27.4 == pytest.approx(0.183, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp8", 1979),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA GeForce GTX 1080", "bf16", None),
    ],
)
def test_peaks_by_device_name(name, precision, rate):
    assert peak_tflops(name, precision) == rate


TINY = DiTConfig(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    ffn_hidden_size=96,
    latent_channels=4,
    text_embed_dim=12,
    image_embed_dim=10,
    freq_dim=32,
)
ROWS = Rows(tokens=24, text=7, image=5)
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def count_with_torch(model: DiTConfig, parallel: DiTParallelConfig) -> dict[str, int]:
    """Operations of the matrix products that torch runs, for forward and for forward and backward, in a worker."""
    from megatron_fsvideo.parallel import groups
    from tests.parallel.harness import run_workers

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs):
        return 2 * sdpa_flop_count(query, key, value)

    def work():
        from megatron_fsvideo.models.dit import build_dit

        dit = build_dit(model, parallel, groups.initialize(parallel), params_dtype=torch.float32)
        inputs = (
            torch.randn(1, model.in_channels, 2, 3, 4 * model.patch_size[2]),
            torch.tensor([300.0]),
            torch.randn(1, ROWS.text, 12) if model.text_embed_dim else None,
            torch.randn(1, ROWS.image, 10) if model.image_embed_dim else None,
        )
        counts = {}
        mapping = {FUSED: attention, FUSED_BACKWARD: attention_backward}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            output = dit(*inputs)
        counts["forward"] = counter.get_total_flops()
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            output.sum().backward()
        counts["both"] = counts["forward"] + counter.get_total_flops()
        return counts

    return run_workers(work, 1)[0]


RECOMPUTED = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}


@pytest.mark.parametrize(
    ("changes", "parallel"),
    [
        ({}, {}),
        ({}, RECOMPUTED),
        ({}, SELECTIVE),
        ({"layer_memory": False, "patch_size": (1, 1, 2), "image_embed_dim": 0}, {}),
        ({"layer_memory": False}, RECOMPUTED | {"recompute_method": "block", "recompute_num_layers": 2}),
    ],
)
def test_counts_are_those_of_torch(changes, parallel):
    model, layout = dataclasses.replace(TINY, **changes), DiTParallelConfig(**parallel)
    counted = count_with_torch(model, layout)

    def matrix_products(parts):
        return total(parts) - parts["layer_memory_mix"]  # the mix is no matrix product to torch

    assert counted["forward"] == pytest.approx(matrix_products(forward_flops(model, ROWS)), rel=1e-9)
    assert counted["both"] == pytest.approx(matrix_products(hardware_flops(model, ROWS, layout)), rel=1e-9)


def test_model_flops_do_not_count_recomputation():
    layout = DiTParallelConfig(**RECOMPUTED)
    model, hardware = training_flops(PAPER, Rows(1984)), hardware_flops(PAPER, Rows(1984), layout)
    assert hardware_flops(PAPER, Rows(1984), DiTParallelConfig()) == model
    assert total(hardware) / total(model) == pytest.approx(4 / 3, rel=2e-3)
    block = DiTParallelConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=10)
    quarter = total(hardware_flops(PAPER, Rows(1984), block)) - total(model)
    assert quarter / (total(hardware) - total(model)) == pytest.approx(0.25)
