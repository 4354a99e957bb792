"""Messages of one rank in one optimizer step, by kind, as parallel/ and megatron-core send them.

Bytes are those that a rank sends: a share (p - 1) / p of the whole tensor for a gather, a scatter or an all-to-all over
p ranks, twice that for an all-reduce.
"""

from dataclasses import dataclass

from megatron_fsvideo.models.flops import recomputed_share
from megatron_fsvideo.planning.activations import FP32, state_bytes
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.weights import embedder_parameters, stage_parameters, weight_bytes


@dataclass(frozen=True)
class Traffic:
    """All messages of one kind in an optimizer step.

    Attributes:
        span: number of consecutive ranks that contain a group; decides whether its links are fast or slow.
        is_per_microbatch: True if sent in every micro-batch, False if sent once a step.
    """

    kind: str
    num_bytes: float
    messages: float
    span: int
    is_per_microbatch: bool = True


def step_traffic(case: Case, stage: int) -> list[Traffic]:
    """Return the messages of a pipeline stage, summed over a step, one entry a kind."""
    kinds = [*_tensor_parallel(case, stage), *_context_parallel(case, stage)]
    kinds += [*_pipeline_parallel(case, stage), *_data_parallel(case, stage)]
    return [traffic for traffic in kinds if traffic.messages]


def _num_layers(case: Case, stage: int) -> tuple[int, int]:
    """Number of layers of a stage, and number of those with layer memory."""
    numbers = [number for chunk in case.chunks(stage) for number in chunk]
    return len(numbers), sum(number > 1 for number in numbers) if case.model.layer_memory else 0


def _tensor_parallel(case: Case, stage: int) -> list[Traffic]:
    tp, micro = case.tp, case.num_microbatches
    if tp == 1:
        return []
    model = case.model
    layers, with_memory = _num_layers(case, stage)
    again = recomputed_share("feed_forward", model, case.parallel) if _recomputes_layers(case) else 0.0
    whole = case.inner_rows * model.hidden_size * case.element * (tp - 1) / tp
    sources = 3 * layers + with_memory  # inputs of the parts; self-attention may have two, in one message
    norms = 2 * (tp - 1) / tp * FP32 * (3 * case.inner_rows + case.context_rows) * layers * (2 + again)
    if case.parallel.sequence_parallel:
        forward, backward = sources + 3 * layers, sources + 3 * layers + layers  # fc1's input is gathered once more
        volume, messages = forward * (1 + again) + backward, 6 * layers * (2 + again) + layers
        name = "TP gathers and scatters"
    else:
        volume = 2 * (3 * layers * (1 + again) + sources)
        messages = 3 * layers * (2 + again)
        name = "TP all-reduces"
    context = 2 * (tp - 1) / tp * case.context_rows * model.hidden_size * case.element
    output = 0.0
    if case.parallel.sequence_parallel and stage == case.pp - 1:
        output = FP32 * case.inner_rows * model.latent_channels * model.patch_volume * (tp - 1) / tp
    kinds = [
        Traffic(name, (volume * whole + context + output) * micro, (messages + 3) * micro, tp),
        Traffic("TP sums of query and key norms", norms * micro, 2 * layers * (2 + again) * micro, tp),
    ]
    if case.parallel.sequence_parallel:
        replicated = 2 * (tp - 1) / tp * FP32 * _local_token_parameters(case, stage)
        kinds.append(Traffic("TP gradients of replicated weights", replicated, 1, tp, False))
    return kinds


def _local_token_parameters(case: Case, stage: int) -> int:
    """Number of replicated parameters that each tensor-parallel rank applies only to its own tokens."""
    model, d = case.model, case.model.hidden_size
    number = embedder_parameters(case).fp32 * len(case.chunks(stage))
    for chunk in case.chunks(stage):
        for layer in chunk:
            number += 6 * d + 2 * d + 3 * d  # table, norm, biases of the three output projections
            number += layer * (d + 1) if model.layer_memory and layer > 1 else 0
    return number


def _context_parallel(case: Case, stage: int) -> list[Traffic]:
    cp = case.cp
    if cp == 1:
        return []
    layers, _ = _num_layers(case, stage)
    share = recomputed_share("self_attention", case.model, case.parallel)
    # Queries, keys and values at once, and the output; recomputing attention alone stops before the output's message.
    again = (4 if _recomputes_layers(case) else 3) * share
    tensor = case.inner_rows * case.model.hidden_size / case.tp * case.element * (cp - 1) / cp
    times = layers * case.num_microbatches
    messages = times * (4 + share * (2 if _recomputes_layers(case) else 1))
    return [Traffic("CP all-to-alls", tensor * (8 + again) * times, messages, case.tp * cp)]


def _pipeline_parallel(case: Case, stage: int) -> list[Traffic]:
    if case.pp == 1:
        return []
    chunks, micro = case.chunks(stage), case.num_microbatches
    span = case.world_size
    forward = [chunk.stop if case.model.layer_memory else 1 for chunk in chunks]
    backward = [chunk.start if case.model.layer_memory else 1 for chunk in chunks]
    if stage == case.pp - 1:
        forward.pop()  # the last chunk's output is the prediction, which is not sent
    if stage == 0:
        backward.pop(0)
    states = (sum(forward) + sum(backward)) * state_bytes(case)
    embedder = embedder_parameters(case).total * FP32 * 2 * (case.pp - 1) / case.pp * len(chunks)
    return [
        Traffic("PP states and their gradients", states * micro, (len(forward) + len(backward)) * micro, span),
        Traffic("PP gradients of the condition embedders", embedder, 1, span, False),
    ]


def _data_parallel(case: Case, stage: int) -> list[Traffic]:
    ranks = case.dp_size * case.cp
    if ranks == 1:
        return []
    share, span = (ranks - 1) / ranks, case.tp * ranks
    gradients = stage_parameters(case, stage).total * FP32 * share
    if not case.parallel.use_distributed_optimizer:
        return [Traffic("DP gradients (all-reduce)", 2 * gradients, 1, span, False)]
    weights = weight_bytes(case, stage)["weights"] * share
    return [
        Traffic("DP gradients (reduce-scatter)", gradients, 1, span, False),
        Traffic("DP weights (all-gather)", weights, 1, span, False),
    ]


def _recomputes_layers(case: Case) -> bool:
    return case.parallel.recompute_granularity == "full"
