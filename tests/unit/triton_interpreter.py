"""Checks of Triton's kernels, to be run as a module with TRITON_INTERPRET=1: python -m ... <check> raw|normalized"""

import sys

import torch

from megatron_fsvideo.kernels import MixSettings, torch_mixing
from tests.unit.mixing_cases import EPSILON, by_mixer, check, make_case, relative


def equals_autograd(mixer, norms_states):
    """24 channels are no power of two, 33 tokens no multiple of a program's 32."""
    for num_states, tokens in ((2, 33), (3, 1), (4, 1), (5, 3), (13, 1), (16, 1), (17, 1), (40, 1)):
        check(mixer, make_case(num_states, (tokens, 2, 24), seed=num_states), norms_states, 2e-5)


def repeats_to_the_bit(mixer, norms_states):
    """Half precision, twice."""
    case = make_case(4, (5, 2, 24), torch.float16)
    check(mixer, case, norms_states, 2e-3)
    first, second = (by_mixer(mixer, case, norms_states) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def pulls_as_torch_does(mixer, norms_states):
    """Three reads and none, with none, one and two gradients from elsewhere."""
    settings = MixSettings(norms_states, EPSILON)
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(5, 2, 24, generator=generator) for _ in range(6)]
    reads = [(torch.rand(5, 2, 4 - k, generator=generator), tensors[k]) for k in range(3)]
    for others in ([], tensors[3:4], tensors[3:5]):
        expected = torch_mixing.pull(others, 1, reads, tensors[5], settings)
        assert relative(mixer.pull(others, 1, reads, tensors[5], settings), expected.double()) < 1e-6
        # A stage of one layer: nobody there has read X_0.
        torch.testing.assert_close(mixer.pull(others, 0, [], tensors[5], settings), sum(others, 0 * tensors[5]))


def mixes_one_state_to_itself(mixer, norms_states):
    """Weight 1 on the last state gives the norm of that state alone, to the bit. 7 channels leave rows unaligned."""
    logits, states, shift, scale, _ = make_case(5, (3, 2, 7), torch.float16)
    logits[:] = 0
    logits[..., -1] = 200.0
    settings = MixSettings(norms_states, EPSILON)
    alone = mixer.mix(logits[..., -1:], states[-1:], shift, scale, settings).output
    assert torch.equal(mixer.mix(logits, states, shift, scale, settings).output, alone)


CHECKS = {
    function.__name__: function
    for function in (equals_autograd, repeats_to_the_bit, pulls_as_torch_does, mixes_one_state_to_itself)
}

if __name__ == "__main__":
    from megatron_fsvideo.kernels import triton_mixing

    torch.set_num_threads(1)
    CHECKS[sys.argv[1]](triton_mixing, sys.argv[2] == "normalized")
