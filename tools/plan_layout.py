"""Plan the layout of a DiT training job: memory of a rank by part, messages, time, and why other layouts are refused.

    python tools/plan_layout.py --preset dit_14b --num-gpus 64 --gpu-memory-gb 80 --frames 121 --height 512 --width 512

    python tools/plan_layout.py --preset dit_14b --num-gpus 64 --frames 121 --height 768 --width 1280 \
        --tensor-model-parallel-size 8 --micro-batch-size 1 --recompute-granularity full

Values without a flag are searched. No model is built and no GPU is needed: the plan is arithmetic on given rates.
docs/planning.md derives the memory, which tests compare with the allocator's bytes.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from megatron_fsvideo.config import (
    DIT_PRESETS,
    DiTConfig,
    build_job,
    given_preset,
    parse_job,
    presets_for,
    run_script,
    spell_flags,
)
from megatron_fsvideo.models.flops import forward_flops, hardware_flops, total, training_flops
from megatron_fsvideo.planning.communication import step_traffic
from megatron_fsvideo.planning.layouts import Plan, PlanConfig, Search, search
from megatron_fsvideo.planning.rates import RateConfig
from megatron_fsvideo.planning.timing import step_seconds
from megatron_fsvideo.planning.weights import stage_parameters


@dataclass(frozen=True)
class PlanJob:
    """Find layouts of a DiT training job that fit, and what they cost."""

    model: DiTConfig = field(default_factory=DiTConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    rates: RateConfig = field(default_factory=RateConfig)


PRESETS = presets_for(PlanJob, DIT_PRESETS)


def flags_of(plan: Plan) -> str:
    """The given model and the layout, as flags of pretrain_dit.py."""
    case, parallel, preset = plan.case, plan.case.parallel, given_preset()
    base = build_job(PlanJob, PRESETS[preset]).model if preset else DiTConfig()
    words = [f"--preset {preset}"] if preset else []
    words += spell_flags(case.model, base)
    words += [f"--tensor-model-parallel-size {case.tp}", f"--context-parallel-size {case.cp}"]
    words += [f"--pipeline-model-parallel-size {case.pp}"]
    words += ["--sequence-parallel"] if parallel.sequence_parallel else []
    for name in (
        "num_virtual_stages_per_pipeline_rank",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "recompute_granularity",
    ):
        value = getattr(parallel, name)
        words += [f"--{name.replace('_', '-')} {value}"] if value is not None else []
    if parallel.recompute_granularity == "selective":
        words.append(f"--recompute-modules {' '.join(parallel.recompute_modules)}")
    words += ["--use-distributed-optimizer"] if parallel.use_distributed_optimizer else []
    words += ["--overlap-grad-reduce"] if parallel.overlap_grad_reduce else []
    words.append("--bf16" if case.bf16 else "--no-bf16")
    words += [f"--micro-batch-size {case.micro_batch_size}", f"--global-batch-size {case.global_batch_size}"]
    return " ".join(words)


def describe(plan: Plan, rates: RateConfig) -> dict[str, Any]:
    """Convert one plan to JSON-able values."""
    case, stage = plan.case, plan.stage
    traffic = [
        dataclasses.asdict(kind) | {"seconds": rates.message_seconds(kind.num_bytes, kind.messages, kind.span)}
        for kind in step_traffic(case, stage)
    ]
    return {
        "flags": flags_of(plan),
        "data_parallel_size": case.dp_size,
        "num_microbatches": case.num_microbatches,
        "stage": stage,
        "parameters_per_rank": stage_parameters(case, stage).total,
        "memory_bytes": plan.memory_bytes,
        "memory": plan.memory,
        "messages_per_step": traffic,
        "seconds": step_seconds(case, rates),
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
    }


def show_table(plans: list[Plan]) -> None:
    """Print one line for each plan."""
    print(
        f"{'TP':>3} {'SP':>3} {'CP':>3} {'PP':>3} {'DP':>3} {'micro':>5} recompute {'GB/rank':>8} {'s/step':>7}", end=""
    )
    print(f" {'tokens/s':>9} {'MFU':>6}")
    for plan in plans:
        case, parallel = plan.case, plan.case.parallel
        print(
            f"{case.tp:3} {'yes' if parallel.sequence_parallel else 'no':>3} {case.cp:3} {case.pp:3} {case.dp_size:3} "
            f"{case.micro_batch_size:5} {parallel.recompute_granularity or 'none':9} {plan.memory_bytes / 1e9:8.1f} "
            f"{plan.step_seconds:7.2f} {plan.tokens_per_second:9.0f} {100 * plan.mfu:4.1f} %"
        )


def show_details(plan: Plan, job: PlanJob) -> None:
    """Print memory, messages, time and work of one plan."""
    case, facts = plan.case, describe(plan, job.rates)
    print(f"\nmemory of a rank of stage {plan.stage} (GB), {facts['parameters_per_rank'] / 1e9:.3f}B parameters")
    for name, size in plan.memory.items():
        if size:
            print(f"  {name:22} {size / 1e9:8.2f}")
    print(f"  {'sum':22} {plan.memory_bytes / 1e9:8.2f} of {job.plan.gpu_memory_gb:g}")
    print(f"\nmessages of that rank in a step of {case.num_microbatches} micro-batches")
    for kind in facts["messages_per_step"]:
        link = "node" if kind["span"] <= job.rates.gpus_per_node else "network"
        print(f"  {kind['kind']:40} {kind['num_bytes'] / 1e9:9.2f} GB {kind['seconds']:8.3f} s  {link}")
    print("\ntime of a step (s), estimated from the rates that --help lists")
    for name, seconds in facts["seconds"].items():
        if seconds:
            print(f"  {name:22} {seconds:8.3f}")
    forward, model, hardware = (
        total(parts) / 1e12
        for parts in (
            forward_flops(case.model, case.rows),
            training_flops(case.model, case.rows),
            hardware_flops(case.model, case.rows, case.parallel),
        )
    )
    print(f"\nwork of a sample (TFLOP): forward {forward:.1f}, training {model:.1f}, with recomputation {hardware:.1f}")
    print(f"\nflags: {flags_of(plan)}")


def refusals(found: Search, plan: PlanConfig) -> dict[str, int]:
    """Map each reason, memory included, to the number of layouts that it ruled out."""
    if not found.too_large:
        return found.refused
    limit, least = plan.gpu_memory_gb - plan.reserved_memory_gb, found.too_large[0].memory_bytes / 1e9
    reason = f"memory: more than the {limit:g} GB of a GPU that are not reserved; the smallest needs {least:.1f} GB"
    return found.refused | {reason: len(found.too_large)}


def show(found: Search, job: PlanJob) -> None:
    """Print the result of the search."""
    plan, rows = job.plan, job.plan.rows(job.model)
    print(
        f"{plan.frames}x{plan.height}x{plan.width}: {rows.tokens} tokens a sample, {plan.batch} samples a step on "
        f"{plan.num_gpus} GPUs; {len(found.fitting)} layouts fit {plan.gpu_memory_gb:g} GB less "
        f"{plan.reserved_memory_gb:g} reserved, {len(found.too_large)} do not\n"
    )
    if found.fitting:
        show_table(found.fitting[: plan.top])
        show_details(found.fitting[0], job)
    elif found.too_large:
        print("none fits; the smallest:")
        show_table(found.too_large[: plan.top])
        show_details(found.too_large[0], job)
    if refused := refusals(found, plan):
        print("\nrefused:")
        for reason, number in sorted(refused.items(), key=lambda item: -item[1]):
            print(f"  {reason}" + (f" ({number} times)" if number > 1 else ""))


def main() -> None:
    """Parse the command line, search, and print the result."""
    job = parse_job(PlanJob, PRESETS)
    found = search(job.model, job.plan, job.rates)
    if job.plan.json:
        kinds = {"fitting": found.fitting, "too_large": found.too_large}
        facts = {name: [describe(plan, job.rates) for plan in plans[: job.plan.top]] for name, plans in kinds.items()}
        print(json.dumps(facts | {"refused": refusals(found, job.plan)}, indent=1))
    else:
        show(found, job)
    if not found.fitting:
        raise ValueError(
            f"no layout fits {job.plan.num_gpus} GPUs of {job.plan.gpu_memory_gb:g} GB: take more GPUs, a smaller "
            "micro_batch_size, recompute_granularity full, or the distributed optimizer"
        )


if __name__ == "__main__":
    run_script(main)
