"""Checks of the kernels of layer memory on a GPU, for test_kernels.py: python -m ... <check> raw|normalized bf16|fp32

With TRITON_INTERPRET=1 and "small" as fourth word they run on a CPU, in fp32.
"""

import sys
from dataclasses import dataclass

import torch

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig
from megatron_fsvideo.kernels import MixSettings
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.parallel import groups
from tests.unit.mixing_cases import EPSILON, by_mixer, check, make_case, reference, relative, slices_of_tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {torch.bfloat16: 8e-3, torch.float32: 2e-5}


@dataclass(frozen=True)
class Sizes:
    """Of a check: the 14B model's at 1024x1024x121, or some that an interpreter can do."""

    shape: tuple[int, int, int] = (7936, 1, 5120)
    num_states: int = 40
    tokens_at_a_time: int = 496  # of the reference: 40 states of them take 0.8 GB in fp64


SMALL = Sizes((6, 2, 24), 4, 4)


def equals_autograd(mixer, norms_states, dtype, sizes, device):
    """Forward and backward at full size."""
    case = make_case(sizes.num_states, sizes.shape, dtype, device=device)
    output, (d_logits, *d_states, d_shift, d_scale) = by_mixer(mixer, case, norms_states)
    sums = [torch.zeros_like(case[2], dtype=torch.float64) for _ in range(2)]
    errors = []
    for part, piece in slices_of_tokens(case, sizes.tokens_at_a_time):
        expected, (e_logits, *e_states, e_shift, e_scale) = reference(piece, norms_states)
        found = [output[part], d_logits[part], *(gradient[part] for gradient in d_states)]
        errors.append([relative(a, b) for a, b in zip(found, [expected, e_logits, *e_states], strict=True)])
        sums[0] += e_shift
        sums[1] += e_scale
    errors.append([relative(d_shift, sums[0]), relative(d_scale, sums[1])])
    assert max(map(max, errors)) < TOLERANCES[dtype], errors


def equals_autograd_at_odd_sizes(mixer, norms_states, dtype, sizes, device):
    """Widths that are no power of two, or leave rows unaligned; several samples; all blocks of states."""
    shapes = [(6, 2, 7)] if sizes is SMALL else [(33, 3, 24), (65, 2, 1000), (5, 2, 7), (130, 1, 3072)]
    for shape in shapes:
        for num_states in (2, 3, 5, 13, 17, 40)[:: 5 if sizes is SMALL else 1]:
            check(mixer, make_case(num_states, shape, dtype, device=device), norms_states, TOLERANCES[dtype])


def pulls_all_reads(mixer, norms_states, dtype, sizes, device):
    """The gradient of X_1, which every layer has read, with two gradients from elsewhere."""
    _, states, *_ = make_case(sizes.num_states + 2, sizes.shape, dtype, device=device)
    state, other, *mix_gradients = states
    generator = torch.Generator(device).manual_seed(1)
    reads = [
        (torch.rand(*sizes.shape[:2], number + 2, generator=generator, device=device), gradient)
        for number, gradient in enumerate(mix_gradients)
    ]
    found = mixer.pull([other, state], 1, reads, state, MixSettings(norms_states, EPSILON))
    x = state.double().requires_grad_()
    source = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPSILON) if norms_states else x
    total = sum(weights[..., 1, None] * gradient.double() for weights, gradient in reads)
    expected = torch.autograd.grad(source, x, total)[0] + other + state
    error = relative(found, expected)
    assert error < TOLERANCES[dtype], error


def repeats_to_the_bit(mixer, norms_states, dtype, sizes, device):
    """Twice the same, at full size."""
    case = make_case(sizes.num_states, sizes.shape, dtype, device=device)
    first, second = (by_mixer(mixer, case, norms_states) for _ in range(2))
    for a, b in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def gradients_of_a_model(norms_states, dtype, pgs, **settings):
    """Output and gradients of a small model with random weights, routers included."""
    config = DiTConfig(
        num_layers=5,
        hidden_size=192,
        num_attention_heads=3,
        ffn_hidden_size=256,
        latent_channels=6,
        text_embed_dim=10,
        image_embed_dim=8,
        freq_dim=16,
        layer_memory_norm="normalized" if norms_states else "raw",
    )
    model = build_dit(config, DiTParallelConfig(**settings), pgs, params_dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator).to(pgs.device)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * draw(*parameter.shape))
    inputs = draw(2, config.in_channels, 3, 4, 3), torch.tensor([100.0, 800.0], device=pgs.device)
    output = model(*inputs, draw(2, 5, config.text_embed_dim), draw(2, 3, config.image_embed_dim))
    output.float().square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def trains_a_model_as_torch_does(mixer, norms_states, dtype, sizes, device):
    """The whole of layer memory with these kernels and with torch's; recomputation changes no bit."""
    pgs = groups.initialize(DiTParallelConfig())
    kept, expected = (
        gradients_of_a_model(norms_states, dtype, pgs, layer_memory_kernel=kernel) for kernel in ("triton", "torch")
    )
    recomputed = gradients_of_a_model(
        norms_states, dtype, pgs, layer_memory_kernel="triton", recompute_granularity="full"
    )
    flat = [torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in (kept, expected)]
    assert relative(flat[0], flat[1].double()) < (0.03 if dtype == torch.bfloat16 else 1e-4)
    # Attention's backward may add in any order on a GPU, which reaches the gradients but not the output.
    assert torch.equal(kept[0], recomputed[0])
    again = torch.cat([tensor.float().flatten() for tensor in recomputed])
    assert relative(again, flat[0].double()) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    groups.shutdown()


CHECKS = {
    function.__name__: function
    for function in (
        equals_autograd,
        equals_autograd_at_odd_sizes,
        pulls_all_reads,
        repeats_to_the_bit,
        trains_a_model_as_torch_does,
    )
}


def main():
    from megatron_fsvideo.kernels import triton_mixing

    name, norm, dtype, *small = sys.argv[1:]
    device = "cpu" if small else "cuda"
    CHECKS[name](triton_mixing, norm == "normalized", DTYPES[dtype], SMALL if small else Sizes(), device)


if __name__ == "__main__":
    main()
