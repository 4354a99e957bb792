"""Layer memory turned on in a trained model (paper Figure 7b): at `--layer-memory-init 0.99` its loss hardly moves."""

import itertools
from dataclasses import replace

import torch

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.diffusion.conditions import first_frame_condition
from megatron_fsvideo.diffusion.flow_matching import add_noise, logit_normal_sigmas, to_timesteps, velocity_target
from megatron_fsvideo.models.dit import build_dit, patchify
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers

MODEL = replace(build_job(DiTJob, DIT_PRESETS["dit_debug"]).model, num_layers=6, layer_memory=False)
NUM_STEPS, BATCH = 140, 16


def flat_clips(number, generator):
    """Latents [b, c, 3, 4, 4] of one sign a channel: what a token should be, it must read off the others."""
    signs = 2.0 * torch.randint(0, 2, (number, MODEL.latent_channels, 1, 1, 1), generator=generator) - 1
    return signs.expand(-1, -1, 3, 4, 4)


def batch(number, generator):
    """The model's arguments, and the velocity as tokens."""
    latents = flat_clips(number, generator)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = logit_normal_sigmas(torch.randn(number, generator=generator), 0.0, 1.0)
    condition = first_frame_condition(latents, MODEL.mask_channels)
    noisy = condition.model_input(add_noise(latents, noise, sigmas))
    text, image = torch.zeros(number, 2, MODEL.text_embed_dim), torch.zeros(number, 1, MODEL.image_embed_dim)
    return (noisy, to_timesteps(sigmas), text, image), patchify(velocity_target(latents, noise), MODEL.patch_size)


def loss_of(model, arguments, target):
    return (model(*arguments) - target).square().mean()


def trained(pgs):
    """A model without layer memory, and its losses before and after on a batch that it has not seen."""
    generator = torch.Generator().manual_seed(5)
    model = build_dit(MODEL, DiTParallelConfig(), pgs, params_dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    unseen = batch(64, generator)
    with torch.no_grad():
        before = loss_of(model, *unseen).item()
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, *batch(BATCH, generator)).backward()
        optimizer.step()
    with torch.no_grad():
        return model, unseen, before, loss_of(model, *unseen).item()


def losses_with_memory():
    """Losses before and after training, and with layer memory by norm and initial weight."""
    pgs = groups.initialize(DiTParallelConfig())
    model, unseen, before, after = trained(pgs)
    found = {}
    for norm, initial_weight in itertools.product(("raw", "normalized"), (1.0, 0.99, 0.5)):
        config = replace(MODEL, layer_memory=True, layer_memory_init=initial_weight, layer_memory_norm=norm)
        with_memory = build_dit(config, DiTParallelConfig(), pgs, params_dtype=torch.float32)
        missing, unexpected = with_memory.load_state_dict(model.state_dict(), strict=False)
        routers = [name for name in missing if ".router." in name]
        assert not unexpected and len(routers) == 2 * (MODEL.num_layers - 1)
        assert all(name in routers or name.endswith("_extra_state") for name in missing), missing
        with torch.no_grad():
            found[norm, initial_weight] = loss_of(with_memory, *unseen).item()
    return before, after, found


def test_the_warm_start_changes_a_trained_models_loss_by_less_than_one_percent():
    before, after, found = run_workers(losses_with_memory, 1)[0]
    print(f"loss {before:.4f}, trained {after:.4f}; with memory {found}")
    assert after < 0.15 * before, "the model learnt nothing: its layers might be the identity"
    for norm in ("raw", "normalized"):
        changes = {weight: found[norm, weight] / after - 1 for weight in (1.0, 0.99, 0.5)}
        assert changes[1.0] == 0
        assert 0 < abs(changes[0.99]) < 0.01
        assert changes[0.5] > 0.05, "this model hardly heeds what keys and values read: the test would prove nothing"
