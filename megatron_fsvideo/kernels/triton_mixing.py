"""The kernels of layer memory in Triton: each state is read once, added up in fp32 registers, and rounded once.

One program works on one token: its row of h channels fits in registers, so the norm's statistics cost no second pass.
The states are tensors of their own, wherever autograd has put them: kernels take an array of their addresses. There are
no atomics: every sum has one order, and results repeat to the bit.

Rows are tokens times samples; `N` stands for their number, D for the channels, L for the states.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

import megatron_fsvideo.kernels.torch_mixing as torch_mixing
from megatron_fsvideo.kernels.mixing import MixResult, MixSettings

# The gradients of shift and scale are summed over this many tokens by one program, and then over programs.
TOKENS_PER_PARTIAL_SUM = 32

# Rows loaded ahead, and the one at work: Triton's pipelining, which a loop without tl.dot must ask for. A row of 5120
# channels is 10 KB; to draw its share of 3.35 TB/s at 700 ns, a multiprocessor of an H100 needs 18 KB under way.
STAGES = 4


def mix(logits: Tensor, states: list[Tensor], shift: Tensor, scale: Tensor, settings: MixSettings) -> MixResult:
    """Mix, norm and modulate the states (`Mixer.mix` defines arguments and result)."""
    states = _contiguous(states)
    tokens, batch, hidden = states[0].shape
    output = torch.empty_like(states[0])
    weights = torch.empty_like(logits, memory_format=torch.contiguous_format)
    memory = torch.empty_like(states[0], dtype=torch.float32 if settings.norms_states else states[0].dtype)
    mean, rstd = (torch.empty(tokens, batch, device=output.device) for _ in range(2))
    _mix_kernel[(tokens * batch,)](
        _addresses(states),
        logits.contiguous(),
        shift.contiguous(),
        scale.contiguous(),
        output,
        weights,
        memory,
        mean,
        rstd,
        batch,
        len(states),
        settings.epsilon,
        STATES_BLOCK=triton.next_power_of_2(len(states)),
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        NORMS_STATES=settings.norms_states,
        STAGES=STAGES,
        num_warps=_num_warps(hidden),
    )
    if settings.norms_states:
        return MixResult(output, weights, memory, None, None)
    return MixResult(output, weights, memory, mean, rstd)


def mix_backward(
    gradient: Tensor, result: MixResult, states: list[Tensor], scale: Tensor, settings: MixSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of `mix` up to the mix itself (`Mixer.mix_backward` defines arguments and results)."""
    states = _contiguous(states)
    tokens, batch, hidden = states[0].shape
    mix_gradient = torch.empty_like(states[0])
    logits_gradient = torch.empty_like(result.weights)
    num_parts = triton.cdiv(tokens, TOKENS_PER_PARTIAL_SUM)
    partial_sums = torch.empty(2, num_parts, batch, hidden, device=gradient.device)
    unused = result.weights
    _mix_backward_kernel[(num_parts * batch,)](
        _addresses(states),
        gradient.contiguous(),
        result.weights,
        result.memory,
        unused if settings.norms_states else result.mean,
        unused if settings.norms_states else result.rstd,
        scale.contiguous(),
        mix_gradient,
        logits_gradient,
        partial_sums,
        tokens,
        batch,
        num_parts,
        len(states),
        settings.epsilon,
        STATES_BLOCK=triton.next_power_of_2(len(states)),
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        TOKENS=TOKENS_PER_PARTIAL_SUM,
        NORMS_STATES=settings.norms_states,
        STAGES=STAGES,
        num_warps=_num_warps(hidden),
    )
    shift_gradient, scale_gradient = partial_sums.sum(1)
    return mix_gradient, logits_gradient, shift_gradient, scale_gradient


def pull(
    gradients: list[Tensor], index: int, reads: list[tuple[Tensor, Tensor]], state: Tensor, settings: MixSettings
) -> Tensor:
    """Whole gradient of one state from all its readers (`Mixer.pull` defines arguments and result)."""
    if not reads:  # no addresses to hand over: a stage of one layer, or the first layer's input alone
        return torch_mixing.pull(gradients, index, reads, state, settings)
    tokens, batch, hidden = state.shape
    state = state.contiguous()
    gradients = _contiguous(gradients)
    first, second = [*gradients, state, state][:2]
    total = torch.empty_like(state)
    # Weights of each read with their row length, which is the reader's number of states.
    weights = [weight for weight, _ in reads]
    lengths = torch.tensor([weight.shape[-1] for weight in weights], dtype=torch.int64)
    _pull_kernel[(tokens * batch,)](
        _addresses(weights, state.device),
        lengths.to(state.device, non_blocking=True),
        _addresses([mix_gradient for _, mix_gradient in reads], state.device),
        state,
        first,
        second,
        total,
        index,
        len(reads),
        settings.epsilon,
        NUM_GRADIENTS=len(gradients),
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        NORMS_STATES=settings.norms_states,
        STAGES=STAGES,
        num_warps=_num_warps(hidden),
    )
    return total


@triton.jit
def _row_pointer(address, offset, element_type: tl.constexpr):
    """Pointer to the start of a row of the tensor whose address lies at `address`.

    Triton knows nothing of an address that it reads: unless told that tensors are aligned, it loads one element at a
    time and none ahead.
    """
    start = tl.load(address).to(tl.pointer_type(element_type))
    return tl.multiple_of(start, 16) + offset


@triton.jit
def _normed_row(row, columns, epsilon, HIDDEN: tl.constexpr):
    """A layer-normed row, fp32, zero beyond HIDDEN; its mean and reciprocal standard deviation."""
    mean = tl.sum(row, axis=0) / HIDDEN
    centred = tl.where(columns < HIDDEN, row - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / HIDDEN + epsilon)
    return centred * rstd, mean, rstd


@triton.jit
def _norm_backward_row(gradient, normed, rstd, columns, HIDDEN: tl.constexpr):
    """The gradient of what was normed."""
    along = tl.sum(gradient * normed, axis=0) / HIDDEN
    mean = tl.sum(gradient, axis=0) / HIDDEN
    return tl.where(columns < HIDDEN, (gradient - mean - normed * along) * rstd, 0.0)


@triton.jit
def _mix_kernel(
    states,
    logits,
    shift,
    scale,
    output,
    weights,
    memory,
    mean_out,
    rstd_out,
    batch,
    num_states,
    epsilon,
    STATES_BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS_STATES: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    which = tl.arange(0, STATES_BLOCK)
    logit = tl.load(logits + row * num_states + which, mask=which < num_states, other=-float("inf"))
    exponential = tl.exp(logit - tl.max(logit, axis=0))
    weight = exponential / tl.sum(exponential, axis=0)
    tl.store(weights + row * num_states + which, weight, mask=which < num_states)

    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(num_states, num_stages=STAGES):
        state = _row_pointer(states + i, row * HIDDEN, output.dtype.element_ty)
        x = tl.load(state + columns, mask=inside, other=0.0).to(tl.float32)
        if NORMS_STATES:
            x, _, _ = _normed_row(x, columns, epsilon, HIDDEN)
        total += tl.sum(tl.where(which == i, weight, 0.0), axis=0) * x
    rounded = total.to(memory.dtype.element_ty)
    tl.store(memory + row * HIDDEN + columns, rounded, mask=inside)
    normed = rounded.to(tl.float32)
    if not NORMS_STATES:
        normed, mean, rstd = _normed_row(normed, columns, epsilon, HIDDEN)
        tl.store(mean_out + row, mean)
        tl.store(rstd_out + row, rstd)
    shift_row = tl.load(shift + sample * HIDDEN + columns, mask=inside, other=0.0)
    scale_row = tl.load(scale + sample * HIDDEN + columns, mask=inside, other=0.0)
    result = normed * (1.0 + scale_row) + shift_row
    tl.store(output + row * HIDDEN + columns, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward_kernel(
    states,
    gradient,
    weights,
    memory,
    mean_in,
    rstd_in,
    scale,
    mix_gradient,
    logits_gradient,
    partial_sums,
    tokens,
    batch,
    num_parts,
    num_states,
    epsilon,
    STATES_BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    NORMS_STATES: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program % batch
    part = program // batch
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    which = tl.arange(0, STATES_BLOCK)
    scale_row = tl.load(scale + sample * HIDDEN + columns, mask=inside, other=0.0)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float32)
    scale_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(part * TOKENS, tl.minimum((part + 1) * TOKENS, tokens)):
        row = token * batch + sample
        g = tl.load(gradient + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(memory + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        if not NORMS_STATES:
            rstd = tl.load(rstd_in + row)
            normed = tl.where(inside, (normed - tl.load(mean_in + row)) * rstd, 0.0)
        shift_sum += g
        scale_sum += g * normed
        g = g * (1.0 + scale_row)
        if not NORMS_STATES:
            g = _norm_backward_row(g, normed, rstd, columns, HIDDEN)
        tl.store(mix_gradient + row * HIDDEN + columns, g.to(mix_gradient.dtype.element_ty), mask=inside)

        weight_gradient = tl.zeros([STATES_BLOCK], dtype=tl.float32)
        for i in tl.range(num_states, num_stages=STAGES):
            state = _row_pointer(states + i, row * HIDDEN, mix_gradient.dtype.element_ty)
            x = tl.load(state + columns, mask=inside, other=0.0).to(tl.float32)
            if NORMS_STATES:
                x, _, _ = _normed_row(x, columns, epsilon, HIDDEN)
            weight_gradient += tl.where(which == i, tl.sum(x * g, axis=0), 0.0)
        weight = tl.load(weights + row * num_states + which, mask=which < num_states, other=0.0)
        logit_gradient = weight * (weight_gradient - tl.sum(weight * weight_gradient, axis=0))
        tl.store(logits_gradient + row * num_states + which, logit_gradient, mask=which < num_states)
    place = (part * batch + sample) * HIDDEN + columns
    tl.store(partial_sums + place, shift_sum, mask=inside)
    tl.store(partial_sums + num_parts * batch * HIDDEN + place, scale_sum, mask=inside)


@triton.jit
def _pull_kernel(
    weights,
    lengths,
    mix_gradients,
    state,
    first,
    second,
    output,
    index,
    num_reads,
    epsilon,
    NUM_GRADIENTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS_STATES: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.range(num_reads, num_stages=STAGES):
        row_of_weights = tl.load(weights + k).to(tl.pointer_type(tl.float32)) + row * tl.load(lengths + k)
        g = _row_pointer(mix_gradients + k, row * HIDDEN, output.dtype.element_ty)
        g = tl.load(g + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(row_of_weights + index) * g
    if NORMS_STATES:
        x = tl.load(state + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
        normed, _, rstd = _normed_row(x, columns, epsilon, HIDDEN)
        total = _norm_backward_row(total, normed, rstd, columns, HIDDEN)
    if NUM_GRADIENTS > 0:
        total += tl.load(first + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    if NUM_GRADIENTS > 1:
        total += tl.load(second + row * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * HIDDEN + columns, total.to(output.dtype.element_ty), mask=inside)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _addresses(tensors: list[Tensor], device: torch.device | None = None) -> Tensor:
    """Addresses of the tensors, int64, on their device. They must be contiguous and live until the kernel has run."""
    row_bytes = tensors[0].shape[-1] * tensors[0].element_size()
    for tensor in tensors:  # `_row_pointer` promises it
        assert tensor.data_ptr() % math.gcd(16, row_bytes) == 0, "a tensor starts within a row of another"
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    return addresses.to(device or tensors[0].device, non_blocking=True)


def _num_warps(hidden: int) -> int:
    return min(16, max(1, triton.next_power_of_2(hidden) // 512))
