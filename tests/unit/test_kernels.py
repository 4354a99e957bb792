"""The kernels of layer memory against fp64, plain torch's here and Triton's in its interpreter."""

import pytest
import torch

from megatron_fsvideo.kernels import MixSettings, torch_mixing

EPSILON = 1e-6


def expected_mix(logits, states, shift, scale, norms_states):
    """The same by stack and einsum, in fp64."""
    stacked = torch.stack(states)
    if norms_states:
        stacked = torch.nn.functional.layer_norm(stacked, stacked.shape[-1:], eps=EPSILON)
    mixed = torch.einsum("sbl,lsbh->sbh", logits.softmax(-1), stacked)
    normed = mixed if norms_states else torch.nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=EPSILON)
    return normed * (1 + scale) + shift


def make_case(num_states, shape=(7, 2, 24), dtype=torch.float32, seed=0):
    """Logits, states, shift, scale and the output's gradient, of which the modulation and logits are fp32."""
    tokens, batch, hidden = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, batch, num_states, generator=generator)
    states = [(torch.randn(shape, generator=generator) * (1 + k) + 0.3 * k).to(dtype) for k in range(num_states)]
    shift, scale = (0.5 * torch.randn(batch, hidden, generator=generator) for _ in range(2))
    gradient = torch.randn(shape, generator=generator).to(dtype)
    return logits, states, shift, scale, gradient


def reference(case, norms_states):
    """Output and the gradients of logits, every state, shift and scale by autograd in fp64."""
    logits, states, shift, scale, gradient = case
    leaves = [tensor.double().requires_grad_() for tensor in (logits, *states, shift, scale)]
    output = expected_mix(leaves[0], leaves[1:-2], leaves[-2], leaves[-1], norms_states)
    return output.detach(), torch.autograd.grad(output, leaves, gradient.double())


def by_mixer(mixer, case, norms_states):
    """The same by a mixer: each state's gradient is pulled from this one read."""
    logits, states, shift, scale, gradient = case
    settings = MixSettings(norms_states, EPSILON)
    result = mixer.mix(logits, states, shift, scale, settings)
    mixed, d_logits, d_shift, d_scale = mixer.mix_backward(gradient, result, states, scale, settings)
    reads = [(result.weights, mixed)]
    pulled = [mixer.pull([], index, reads, state, settings) for index, state in enumerate(states)]
    return result.output, [d_logits, *pulled, d_shift, d_scale]


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(mixer, case, norms_states, tolerance):
    output, gradients = by_mixer(mixer, case, norms_states)
    expected_output, expected_gradients = reference(case, norms_states)
    assert output.dtype == case[1][0].dtype
    assert relative(output, expected_output) < tolerance
    for index, (found, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert relative(found, expected) < tolerance, index


@pytest.mark.parametrize("norms_states", [False, True])
@pytest.mark.parametrize("num_states", range(2, 41))
def test_torch_kernels_equal_autograd_in_fp64(num_states, norms_states):
    check(torch_mixing, make_case(num_states), norms_states, 2e-5)


@pytest.mark.parametrize("norms_states", [False, True])
def test_torch_kernels_are_exact_in_fp64_and_round_once_in_bf16(norms_states):
    case = [tensor if isinstance(tensor, list) else tensor.double() for tensor in make_case(5)]
    case[1] = [state.double() for state in case[1]]
    check(torch_mixing, case, norms_states, 1e-12)
    check(torch_mixing, make_case(5, dtype=torch.bfloat16), norms_states, 8e-3)


@pytest.mark.parametrize("norms_states", [False, True])
def test_pull_adds_many_reads_and_other_gradients(norms_states):
    """Three layers read X_1, and two gradients arrive from elsewhere."""
    settings = MixSettings(norms_states, EPSILON)
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(5, 2, 16, generator=generator)
    reads = [
        (torch.rand(5, 2, number, generator=generator), torch.randn(5, 2, 16, generator=generator))
        for number in (4, 3, 2)
    ]
    others = [torch.randn(5, 2, 16, generator=generator) for _ in range(2)]
    x = state.double().requires_grad_()
    source = torch.nn.functional.layer_norm(x, (16,), eps=EPSILON) if norms_states else x
    sum(((w[..., 1, None] * source) * g).sum() for w, g in reads).backward()
    expected = x.grad + others[0] + others[1]
    assert relative(torch_mixing.pull(others, 1, reads, state, settings), expected) < 1e-6


def test_the_mix_is_local_to_the_token():
    logits, states, shift, scale, _ = make_case(3)
    settings = MixSettings(False, EPSILON)
    before = torch_mixing.mix(logits, states, shift, scale, settings).output
    states[1] = states[1].clone()
    states[1][4, 1] += torch.linspace(-1, 1, 24)
    changed = (torch_mixing.mix(logits, states, shift, scale, settings).output != before).any(-1)
    assert changed.nonzero().tolist() == [[4, 1]]
