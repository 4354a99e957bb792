"""The layout planner: its memory is the allocator's, its messages are those sent, its refusals are tested."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fsvideo.config import DIT_PRESETS, DiTConfig, DiTJob, DiTParallelConfig, parse_job
from megatron_fsvideo.models.flops import Rows
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.communication import step_traffic
from megatron_fsvideo.planning.layouts import PlanConfig, search
from megatron_fsvideo.planning.memory import activation_memory, chunks_in_flight, peak_memory
from megatron_fsvideo.planning.rates import RateConfig
from megatron_fsvideo.planning.timing import speed, step_seconds
from megatron_fsvideo.planning.weights import stage_parameters, weight_bytes

ROOT = Path(__file__).parents[2]
PAPER = DiTConfig()
SMALL = DiTConfig(
    num_layers=4,
    hidden_size=96,
    num_attention_heads=4,
    ffn_hidden_size=256,
    latent_channels=8,
    text_embed_dim=32,
    image_embed_dim=24,
    freq_dim=32,
)
GRID, ROWS = (4, 8, 8), Rows(256, 16, 8)


def case(model=None, bf16=True, num_microbatches=1, dp=1, **parallel) -> Case:
    changed = dataclasses.replace(SMALL, **(model or {}))
    return Case(changed, DiTParallelConfig(**parallel), ROWS, 2, num_microbatches, dp, bf16, has_ema=False)


FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}
TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2, "num_microbatches": 3}

ALONE = {
    "bf16": case(),
    "fp32": case(bf16=False),
    "without_memory": case({"layer_memory": False}),
    "full_12_layers": case({"num_layers": 12}, **FULL),
    "full_two_at_once": case({"num_layers": 8, "layer_memory": False}, recompute_num_layers=2, **FULL),
    "full_block": case(recompute_method="block", recompute_num_layers=3, **FULL),
    "selective": case(**SELECTIVE),
    "normalized_wide": case({"hidden_size": 192, "ffn_hidden_size": 384, "layer_memory_norm": "normalized"}),
}
TOGETHER = {
    "tp": case(**TP),
    "tp_sp": case(sequence_parallel=True, **TP),
    "cp": case(context_parallel_size=2),
    "pp": case(**PP),
    "pp_full": case(**PP, **FULL),
    "dp_distributed_optimizer": case(dp=2, use_distributed_optimizer=True),
}

SLOW = ("tp", "pp_full")
TWO_PROCESSES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TOGETHER]


@functools.cache
def measured_alone() -> dict:
    from tests.memory_measurement import measure
    from tests.parallel.harness import run_workers

    def work():
        return {name: measure(one, GRID) for name, one in ALONE.items()}

    return run_workers(work, 1, timeout=300)[0]


@functools.cache
def measured_together(name: str) -> list[dict]:
    from tests.memory_measurement import measure
    from tests.parallel.harness import run_workers

    return run_workers(lambda: measure(TOGETHER[name], GRID), 2, timeout=300)


def check_memory(one: Case, stage: int, measured: dict) -> None:
    static = weight_bytes(one, stage)
    for name in ("weights", "gradients", "optimizer state"):
        # The distributed optimizer pads its buffers.
        assert static[name] == pytest.approx(measured[name], rel=0.02), name
    planned = activation_memory(one, stage)
    del planned["inputs"]  # made before the measurement began
    assert sum(planned.values()) == pytest.approx(measured["activations"], rel=0.1), planned


@pytest.mark.parametrize("name", ALONE)
def test_memory_is_the_allocators(name):
    check_memory(ALONE[name], 0, measured_alone()[name])


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_memory_of_two_processes_is_the_allocators(name):
    one = TOGETHER[name]
    for rank, measured in enumerate(measured_together(name)):
        check_memory(one, rank if one.pp > 1 else 0, measured)


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_messages_are_those_sent(name):
    one = TOGETHER[name]
    for rank, measured in enumerate(measured_together(name)):
        planned = sum(traffic.num_bytes for traffic in step_traffic(one, rank if one.pp > 1 else 0))
        assert planned == pytest.approx(measured["messages"], rel=0.01)


def test_parameters_at_the_papers_sizes():
    whole = Case(PAPER, DiTParallelConfig(), Rows(1984))
    assert stage_parameters(whole, 0).total == 16_399_993_728 + 819
    plain = dataclasses.replace(whole, model=dataclasses.replace(PAPER, layer_memory=False))
    assert stage_parameters(plain, 0).total == 16_395_800_448
    # 18 bytes a parameter, less where the model is fp32 and has no master copy.
    assert sum(weight_bytes(dataclasses.replace(whole, has_ema=False), 0).values()) / 1e9 == pytest.approx(
        295, rel=0.01
    )


def test_bank_and_packs_at_the_papers_sizes():
    whole = Case(PAPER, DiTParallelConfig(recompute_granularity="full"), Rows(1984))
    memory = activation_memory(whole, 0)
    assert memory["layer-memory bank"] / 1e9 == pytest.approx(0.81, rel=0.01)
    assert memory["activations"] == 0
    stages = Case(PAPER, DiTParallelConfig(pipeline_model_parallel_size=4), Rows(1984))
    sent = []
    for stage in range(4):
        kinds = {traffic.kind: traffic for traffic in step_traffic(stages, stage)}
        sent.append(kinds["PP states and their gradients"].num_bytes / 1e6)
    # Boundaries of 224, 427 and 630 MB; a stage sends states forward and gradients backward.
    assert sent == pytest.approx([224, 224 + 427, 427 + 630, 630], rel=0.005)


def test_layers_of_virtual_stages():
    parallel = DiTParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    virtual = Case(dataclasses.replace(SMALL, num_layers=8), parallel, ROWS, num_microbatches=4)
    assert [virtual.chunks(stage) for stage in range(2)] == [[range(1, 3), range(5, 7)], [range(3, 5), range(7, 9)]]
    assert [chunks_in_flight(virtual, stage) for stage in range(2)] == [5, 3]
    ends = DiTParallelConfig(
        pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=2
    )
    uneven = Case(dataclasses.replace(SMALL, num_layers=5), ends, ROWS, num_microbatches=2)
    assert [uneven.chunks(stage) for stage in range(3)] == [[range(1, 2)], [range(2, 4)], [range(4, 6)]]
    assert [chunks_in_flight(uneven, stage) for stage in range(3)] == [2, 2, 1]


def refusals(**plan) -> str:
    found = search(PAPER, PlanConfig(**plan), RateConfig())
    assert not found.fitting and not found.too_large
    return "\n".join(found.refused)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"num_gpus": 5, "tensor_model_parallel_size": 5}, "5 does not divide ffn_hidden_size 13824"),
        ({"num_gpus": 16, "context_parallel_size": 16}, "= 16 does not divide num_attention_heads 40"),
        (
            {"num_gpus": 16, "tensor_model_parallel_size": 4, "context_parallel_size": 4},
            "tensor_model_parallel_size 4 x context_parallel_size 4 = 16 does not divide num_attention_heads 40",
        ),
        (
            {"num_gpus": 8, "context_parallel_size": 8, "height": 384, "width": 640},
            "1860 tokens cannot be shared evenly by context_parallel_size 8",
        ),
        ({"num_gpus": 16, "tensor_model_parallel_size": 16}, "TP 16 would gather every layer's tokens between nodes"),
        ({"num_gpus": 7, "pipeline_model_parallel_size": 3}, "TP 1 x CP 1 x PP 3 = 3 does not divide num_gpus 7"),
        ({"num_gpus": 64, "pipeline_model_parallel_size": 64}, "PP 64 has more stages than num_layers 40"),
        (
            {"num_gpus": 3, "pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 1, "global_batch_size": 4}
            | {"context_parallel_size": 1},
            "global_batch_size 4 is not a multiple of micro_batch_size 1 x DP 3",
        ),
    ],
)
def test_refusals_say_why(plan, reason):
    assert reason in refusals(**plan)


def test_fp8_pads_tokens_and_refuses_widths():
    plan = PlanConfig(num_gpus=8, height=384, width=640, fp8=True, micro_batch_size=1, global_batch_size=8)
    found = search(PAPER, plan, RateConfig())  # 1860 tokens
    assert found.fitting or found.too_large
    narrow = dataclasses.replace(PAPER, ffn_hidden_size=13832)
    refused = search(narrow, plan, RateConfig())
    assert not refused.fitting and not refused.too_large
    assert any("ffn_hidden_size 13832 / TP 1 = 13832 is not a multiple of 16" in reason for reason in refused.refused)


def test_uneven_stages_are_found():
    plan = PlanConfig(num_gpus=3, pipeline_model_parallel_size=3, global_batch_size=3, gpu_memory_gb=400.0)
    plans = search(PAPER, plan, RateConfig()).fitting
    assert {len(chunk) for plan in plans for stage in range(3) for chunk in plan.case.chunks(stage)} == {13, 14}


def test_search_of_the_paper_on_64_gpus():
    found = search(PAPER, PlanConfig(num_gpus=64, gpu_memory_gb=80.0), RateConfig())
    assert found.fitting and found.too_large
    speeds = [plan.tokens_per_second for plan in found.fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.memory_bytes <= 74e9 for plan in found.fitting)
    assert all(plan.memory_bytes > 74e9 for plan in found.too_large)
    for plan in found.fitting[:20]:
        assert plan.case.world_size == 64 and plan.case.global_batch_size == 128
        assert peak_memory(plan.case)[1] == plan.memory


def test_speed_follows_the_rates():
    one = Case(PAPER, DiTParallelConfig(recompute_granularity="full"), Rows(7936), num_microbatches=4)
    free = {"elementwise_passes": 0.0, "message_microseconds": 0.0, "memory_gbs": 1e9}
    rates = RateConfig(gemm_tflops=989.0, attention_tflops=989.0, **free)
    # Everything at the peak, and a quarter of the work is recomputation.
    assert speed(one, rates)["mfu"] == pytest.approx(0.75, rel=0.01)
    slower = dataclasses.replace(rates, gemm_tflops=989.0 / 2)
    assert step_seconds(one, slower)["matrix products"] == pytest.approx(
        2 * step_seconds(one, rates)["matrix products"]
    )
    pipelined = dataclasses.replace(one, parallel=DiTParallelConfig(pipeline_model_parallel_size=4), num_microbatches=8)
    seconds = step_seconds(pipelined, rates)
    busy = sum(value for name, value in seconds.items() if name not in ("optimizer", "pipeline bubble"))
    assert seconds["pipeline bubble"] == pytest.approx(busy * 3 / 8)


def test_sizes_off_the_grid_are_refused():
    with pytest.raises(
        ValueError, match="height 720 is not a multiple of spatial_factor 64; the nearest are 704 and 768"
    ):
        PlanConfig(height=720)
    with pytest.raises(ValueError, match="frames 120 is not 1 \\+ a multiple of temporal_factor 4"):
        PlanConfig(frames=120)
    with pytest.raises(ValueError, match="gemm_tflops must be a number above 0, got 0.0"):
        RateConfig(gemm_tflops=0.0)


def plan_layout(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "plan_layout.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_tool_prints_flags_that_the_entry_script_takes():
    flags = "--preset dit_14b --num-layers 38 --no-layer-memory --num-gpus 16 --height 768 --width 1280 --json"
    result = plan_layout(*flags.split())
    assert result.returncode == 0, result.stderr
    plans = json.loads(result.stdout)["fitting"]
    assert plans
    for plan in plans:
        job = parse_job(DiTJob, DIT_PRESETS, plan["flags"].split())
        assert (job.model.num_layers, job.model.layer_memory, job.training.bf16) == (38, False, True)
        assert job.training.global_batch_size == 32
        assert sum(plan["memory"].values()) == plan["memory_bytes"] <= 74e9


def test_tool_says_when_nothing_fits():
    result = plan_layout("--preset", "dit_14b", "--num-gpus", "1")
    assert result.returncode == 1
    assert "memory: more than the 74 GB of a GPU that are not reserved; the smallest needs" in result.stdout
    assert "none fits; the smallest" in result.stdout and "moving average" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: no layout fits 1 GPUs of 80 GB")


def test_planning_needs_no_torch():
    code = "import sys, megatron_fsvideo.planning.layouts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
