"""Cases for the kernels of layer memory and their fp64 reference, shared by the tests of all implementations."""

import torch

from megatron_fsvideo.kernels import MixSettings

EPSILON = 1e-6


def expected_mix(logits, states, shift, scale, norms_states):
    """The same by stack and einsum, in fp64."""
    stacked = torch.stack(states)
    if norms_states:
        stacked = torch.nn.functional.layer_norm(stacked, stacked.shape[-1:], eps=EPSILON)
    mixed = torch.einsum("sbl,lsbh->sbh", logits.softmax(-1), stacked)
    normed = mixed if norms_states else torch.nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=EPSILON)
    return normed * (1 + scale) + shift


def make_case(num_states, shape=(7, 2, 24), dtype=torch.float32, seed=0, device="cpu"):
    """Logits, states, shift, scale and the output's gradient, of which the modulation and logits are fp32."""
    tokens, batch, hidden = shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, device=device)

    logits = draw(tokens, batch, num_states)
    states = [(draw(*shape) * (1 + k) + 0.3 * k).to(dtype) for k in range(num_states)]
    shift, scale = (0.5 * draw(batch, hidden) for _ in range(2))
    gradient = draw(*shape).to(dtype)
    return logits, states, shift, scale, gradient


def reference(case, norms_states):
    """Output and the gradients of logits, every state, shift and scale by autograd in fp64."""
    logits, states, shift, scale, gradient = case
    leaves = [tensor.double().requires_grad_() for tensor in (logits, *states, shift, scale)]
    output = expected_mix(leaves[0], leaves[1:-2], leaves[-2], leaves[-1], norms_states)
    return output.detach(), torch.autograd.grad(output, leaves, gradient.double())


def slices_of_tokens(case, number):
    """The case in parts of so many tokens, which do not depend on one another."""
    logits, states, shift, scale, gradient = case
    for start in range(0, len(logits), number):
        part = slice(start, start + number)
        yield part, (logits[part], [state[part] for state in states], shift, scale, gradient[part])


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
