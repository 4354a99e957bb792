"""Gradients of a frozen DiT's inputs do not depend on the layout: what distillation and rewards train through.

One process that keeps all activations is the reference; the layouts recompute theirs, in evaluation mode.
"""

import functools

import pytest
import torch

from megatron_fsvideo.config import DiTParallelConfig
from megatron_fsvideo.diffusion.conditions import Condition
from megatron_fsvideo.models.dit import Denoiser, build_dit
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.sequence import all_gather_slices
from tests.parallel.harness import run_workers
from tests.parallel.test_layouts import FULL, MODEL, randomize, relative

LAYOUTS = {
    "tp2": (2, DiTParallelConfig(tensor_model_parallel_size=2, **FULL)),
    "tp2_sp": (2, DiTParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, **FULL)),
    "cp2": (2, DiTParallelConfig(context_parallel_size=2, **FULL)),
    "tp2_sp_cp2": (
        4,
        DiTParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, **FULL),
    ),
}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[torch.Tensor, Condition]:
    """Noisy latents and a condition; gradients are asked of the latents of both."""
    shape = (2, MODEL.latent_channels, 3, 4, 4)
    mask = torch.zeros(2, MODEL.mask_channels, *shape[2:])
    mask[:, :, 0] = 1
    text, image = drawn(3, 2, 5, MODEL.text_embed_dim), drawn(4, 2, 3, MODEL.image_embed_dim)
    return drawn(1, *shape).requires_grad_(), Condition(mask, drawn(2, *shape).requires_grad_(), text, image)


def loss_of(velocity: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * velocity.square()).mean(0).sum()


def gradients(parallel: DiTParallelConfig, prediction_type: str) -> dict:
    """Of two unrolled steps: of whole latents, and of this rank's tokens."""
    pgs = groups.initialize(parallel)
    model = build_dit(MODEL, parallel, pgs, params_dtype=torch.float32).eval().requires_grad_(False)
    randomize([model], pgs)
    denoiser = Denoiser(model, prediction_type)
    weights, high, low = drawn(5, 2, MODEL.latent_channels, 3, 4, 4), torch.tensor([0.9, 0.7]), torch.tensor([0.6, 0.4])
    found = {}

    noisy, condition = inputs()
    halfway = noisy - 0.3 * denoiser.velocity(noisy, high, condition)
    velocity = denoiser.under(condition)(halfway, low)
    loss_of(velocity, weights).backward()
    found["whole"] = {"velocity": velocity, "noisy": noisy.grad, "condition": condition.latents.grad}

    noisy, condition = inputs()
    embedded = denoiser.embed_conditions(condition)
    tokens = denoiser.local_tokens(noisy).detach().requires_grad_()
    halfway = tokens - 0.3 * denoiser.local_velocity(tokens, high, embedded)
    velocity = denoiser.local_velocity(halfway, low, embedded)
    loss_of(velocity, denoiser.local_tokens(weights)).backward()
    whole = [all_gather_slices(tensor, 1, pgs.cp) for tensor in (velocity, tokens.grad)]
    found["local"] = {"velocity": whole[0], "noisy": whole[1], "condition": condition.latents.grad}

    assert all(parameter.grad is None for parameter in model.parameters())
    groups.shutdown()
    return found


@functools.cache
def reference(prediction_type: str) -> dict:
    return run_workers(gradients, 1, DiTParallelConfig(), prediction_type)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_input_gradients_are_those_of_one_process(name):
    world_size, parallel = LAYOUTS[name]
    # The output becomes a velocity after the layout's exchanges: one layout with the other kind of output is enough.
    prediction_type = "sample" if name == "cp2" else "velocity"
    expected = reference(prediction_type)
    for rank in run_workers(gradients, world_size, parallel, prediction_type):
        for way, tensors in expected.items():
            for what, tensor in tensors.items():
                assert tensor.abs().max() > 1e-3
                error = relative(rank[way][what], tensor)
                assert error < 1e-5, f"{what} of {way}: {error:.2e}"


def test_both_ways_in_are_one():
    """Whole latents and tokens hold the same numbers in another order."""
    found = reference("velocity")
    for what in ("velocity", "noisy"):
        whole, local = (found[way][what].flatten().sort().values for way in ("whole", "local"))
        torch.testing.assert_close(whole, local, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["whole"]["condition"], found["local"]["condition"])
