"""Estimates the time of an optimizer step from stated rates. The estimate ranks layouts; it is not a measurement."""

from megatron_fsvideo.models.flops import LAYER_PARTS, hardware_flops, recomputed_share, total, training_flops
from megatron_fsvideo.planning.activations import state_bytes
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.communication import step_traffic
from megatron_fsvideo.planning.rates import RateConfig
from megatron_fsvideo.planning.weights import stage_parameters

ATTENTION_PARTS = ("self_attention", "cross_attention")


def step_seconds(case: Case, rates: RateConfig) -> dict[str, float]:
    """Seconds of a step by part. The slowest stage sets the pace of the pipeline."""
    stages = [_stage_seconds(case, stage, rates) for stage in range(case.pp)]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    busy = {name: seconds for name, seconds in slowest.items() if name not in ("DP messages", "optimizer")}
    # Filling and draining the pipeline: (stages - 1) micro-batches of work, less with virtual stages.
    bubble = sum(busy.values()) * (case.pp - 1) / (case.num_microbatches * case.parallel.num_chunks)
    return slowest | {"pipeline bubble": bubble}


def speed(case: Case, rates: RateConfig) -> dict[str, float]:
    """Seconds of a step, tokens/s of the whole job, and MFU."""
    seconds = sum(step_seconds(case, rates).values())
    samples = case.global_batch_size
    flops = samples * total(training_flops(case.model, case.rows))
    return {
        "step_seconds": seconds,
        "tokens_per_second": samples * case.rows.tokens / seconds,
        "mfu": flops / seconds / case.world_size / (1e12 * rates.peak_tflops),
    }


def _stage_seconds(case: Case, stage: int, rates: RateConfig) -> dict[str, float]:
    parts = _compute_seconds(case, stage, rates)
    names = {"TP": "TP messages", "CP": "CP messages", "PP": "PP messages", "DP": "DP messages"}
    parts |= dict.fromkeys(names.values(), 0.0)
    for traffic in step_traffic(case, stage):
        seconds = rates.message_seconds(traffic.num_bytes, traffic.messages, traffic.span)
        parts[names[traffic.kind[:2]]] += seconds
    if case.parallel.overlap_grad_reduce:  # weight gathers and the last bucket are not hidden: assume half
        parts["DP messages"] /= 2
    shards = case.dp_size * case.cp if case.parallel.use_distributed_optimizer else 1
    # AdamW reads the gradient, reads and writes master weight and two moments, writes the weight: about 30 bytes.
    parts["optimizer"] = 30.0 * stage_parameters(case, stage).total / shards / (rates.memory_gbs * 1e9)
    return parts


def _compute_seconds(case: Case, stage: int, rates: RateConfig) -> dict[str, float]:
    model = case.model
    flops = hardware_flops(model, case.rows, case.parallel)
    chunks = case.chunks(stage)
    layers = [number for chunk in chunks for number in chunk]
    samples = case.micro_batch_size * case.num_microbatches
    share = samples * len(layers) / model.num_layers / (case.tp * case.cp)
    attention = sum(flops[name] for name in ATTENTION_PARTS) * share
    products = [name for name in LAYER_PARTS if not name.startswith("layer_memory") and name not in ATTENTION_PARTS]
    # The keys and values of the context are not cut over context-parallel ranks, nor is the condition embedder.
    cut = {name: case.cp if name == "context_linears" else 1 for name in products}
    gemm = sum(flops[name] * cut[name] for name in products) * share
    gemm += flops["condition_embedder"] * samples * len(chunks)
    if stage == 0:
        gemm += flops["patch_embedding"] * samples / case.cp
    if stage == case.pp - 1:
        gemm += flops["head"] * samples / case.cp
    again = recomputed_share("layer_memory_mix", model, case.parallel)
    state = state_bytes(case) * case.num_microbatches
    reads = sum(number for number in layers if number > 1) if model.layer_memory else 0
    # Forward reads l states and writes one. Backward reads them twice: for the weights' and for the states' gradients.
    moved = (reads + len(layers)) * (1 + again) + 2 * reads + 4 * len(layers) if reads else 0.0
    elementwise = rates.elementwise_passes * len(layers) * (3 + again)
    bandwidth = rates.memory_gbs * 1e9
    return {
        "matrix products": gemm / (rates.gemm_tflops * 1e12),
        "attention": attention / (rates.attention_tflops * 1e12),
        "layer memory": moved * state / bandwidth,
        "element-wise": elementwise * state / bandwidth,
    }
