"""Peak memory of one rank, by part (docs/planning.md derives it; tests/unit/test_planner.py measures it)."""

from megatron_fsvideo.planning.activations import (
    FP32,
    batch_bytes,
    embedding_bytes,
    head_bytes,
    layer_bytes,
    objective_bytes,
    state_bytes,
)
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.weights import weight_bytes

MemoryByPart = dict[str, float]


def stage_memory(case: Case, stage: int) -> MemoryByPart:
    """Peak bytes of one rank of a pipeline stage, by part."""
    return weight_bytes(case, stage) | activation_memory(case, stage)


def peak_memory(case: Case) -> tuple[int, MemoryByPart]:
    """The pipeline stage that needs most memory, and its bytes by part."""
    stages = [stage_memory(case, stage) for stage in range(case.pp)]
    worst = max(range(case.pp), key=lambda stage: sum(stages[stage].values()))
    return worst, stages[worst]


def activation_memory(case: Case, stage: int) -> MemoryByPart:
    """Memory that a step allocates and frees, at its peak, by part."""
    chunks = case.chunks(stage)
    is_last = stage == case.pp - 1
    in_flight = chunks_in_flight(case, stage) / len(chunks)  # passes in flight, averaged over the rank's chunks
    states = sum(_stored_states(case, chunk, stage, index) for index, chunk in enumerate(chunks))
    kept = [_kept(case, chunk) for chunk in chunks]
    # Kept layers come last in a chunk: their activations are gone when the first layer is recomputed.
    recomputed = max(max(_recomputed_at_once(case, chunk) - own, 0.0) for chunk, own in zip(chunks, kept, strict=True))
    head = head_bytes(case) if is_last else 0.0
    memory = {
        "inputs": (batch_bytes(case) + objective_bytes(case)) * in_flight,
        "embeddings": embedding_bytes(case) * in_flight * len(chunks),
        "layer inputs" if not case.model.layer_memory else "layer-memory bank": states * state_bytes(case) * in_flight,
        "activations": sum(kept) * in_flight,
        "pipeline packs": _pack_bytes(case, stage),
        "gather buffers": _gather_buffer_bytes(case),
    }
    at_head = head + FP32 * 3 * case.outer_rows * case.model.hidden_size * is_last
    at_layer = recomputed + _backward_bytes(case)
    memory["head"] = at_head if at_head >= at_layer else 0.0
    memory["recomputed layers"] = recomputed if at_head < at_layer else 0.0
    memory["backward"] = _backward_bytes(case) if at_head < at_layer else 0.0
    return {name: float(value) for name, value in memory.items()}


def chunks_in_flight(case: Case, stage: int) -> int:
    """Forward passes of model chunks whose backward is still to come, at most (Megatron's 1F1B schedules)."""
    virtual, micro = case.parallel.num_chunks, case.num_microbatches
    if virtual == 1:
        return min(case.pp - stage, micro)
    warm_up = (case.pp - stage - 1) * 2 + (virtual - 1) * case.pp
    return min(warm_up + 1, micro * virtual)


def _stored_states(case: Case, chunk: range, stage: int, chunk_index: int) -> int:
    """Number of states X_l that a chunk holds of one micro-batch, including the received ones."""
    is_first = stage == 0 and chunk_index == 0
    if case.model.layer_memory:
        received = 0 if is_first else chunk.start  # X_0 .. X_{k}: as many as the index of the first layer
        return received + len(chunk) - (0 if is_first else 1)
    recomputed = sum(_is_recomputed(case, index) for index in range(len(chunk)))
    together = case.parallel.recompute_num_layers if case.parallel.recompute_method == "uniform" else 1
    # In fp32 the first norm keeps the layer's input itself, in bf16 a copy of it.
    return -(-recomputed // together) + (0 if case.bf16 else len(chunk) - recomputed)


def _kept(case: Case, chunk: range) -> float:
    """Bytes of one micro-batch's activations in a chunk, without the states."""
    layers = [sum(layer_bytes(case, number).values()) for number in chunk]
    return sum(kept for index, kept in enumerate(layers) if not _is_recomputed(case, index))


def _recomputed_at_once(case: Case, chunk: range) -> float:
    """Most bytes of recomputed activations that exist together during a chunk's backward pass."""
    layers = [sum(layer_bytes(case, number).values()) for number in chunk]
    recomputed = [size for index, size in enumerate(layers) if _is_recomputed(case, index)]
    uniform = case.parallel.recompute_method == "uniform" and not case.model.layer_memory
    together = case.parallel.recompute_num_layers if uniform else 1
    groups = [recomputed[first : first + together] for first in range(0, len(recomputed), together)]
    return max((sum(group) for group in groups), default=0.0)


def _is_recomputed(case: Case, layer_index: int) -> bool:
    """Whether a chunk's layer is recomputed; `layer_index` counts from 0."""
    parallel = case.parallel
    if parallel.recompute_granularity != "full":
        return False
    return parallel.recompute_method == "uniform" or layer_index < parallel.recompute_num_layers


def _pack_bytes(case: Case, stage: int) -> float:
    """Bytes sent and received at once: gradients of the outgoing states, and one outgoing tensor of either kind."""
    if case.pp == 1:
        return 0.0
    incoming = [chunk.start for chunk in case.chunks(stage)]
    outgoing = [chunk.stop for chunk in case.chunks(stage)]
    if not case.model.layer_memory:
        incoming, outgoing = [1] * len(incoming), [1] * len(outgoing)
    number = max(outgoing) if stage < case.pp - 1 else 0
    number += max(incoming) if stage > 0 else 0
    return number * state_bytes(case)


def _gather_buffer_bytes(case: Case) -> float:
    """Bytes of Megatron's buffer for gathered inputs of the feed-forward layer."""
    if not case.parallel.sequence_parallel:
        return 0.0
    return case.inner_rows * case.model.hidden_size * case.element


def _backward_bytes(case: Case) -> float:
    """Bytes of gradients during a layer's backward pass, at its gated residual or at its feed-forward layer."""
    width, f, e = case.model.hidden_size, case.model.ffn_hidden_size / case.tp, case.element
    outer = case.outer_rows * width
    residual = outer * (3 * FP32 + e)
    feed_forward = outer * 2 * e + 2 * e * case.inner_rows * f + e * width * f - outer * FP32
    return max(residual, feed_forward)
