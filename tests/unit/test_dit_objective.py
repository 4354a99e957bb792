"""What the DiT learns from a batch: draws belong to samples, dropped text, condition, the error of whole samples."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_fsvideo.config import DIT_PRESETS, DiffusionConfig, DiTJob, build_job
from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.models.dit import Denoiser, patchify
from megatron_fsvideo.tasks.dit.objective import (
    hidden_first_frames,
    make_noisy,
    pad_rows,
    training_draws,
    validation_draws,
    velocity_mse,
)

MODEL = build_job(DiTJob, DIT_PRESETS["dit_debug"]).model
ALONE = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))


def denoiser_of(prediction_type):
    """Without weights: what turns a prediction into a velocity."""
    return Denoiser(SimpleNamespace(pgs=ALONE, model_config=MODEL), prediction_type)


def batch_of(ids, epochs=None):
    b = len(ids)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        sample_ids=torch.tensor(ids),
        epochs=torch.tensor(epochs or [0] * b),
        latents=torch.randn(b, MODEL.latent_channels, 2, 4, 4, generator=generator),
        text=torch.randn(b, 6, MODEL.text_embed_dim, generator=generator),
        image=torch.randn(b, 3, MODEL.image_embed_dim, generator=generator),
    )


def test_draws_belong_to_the_sample_and_its_epoch():
    diffusion = DiffusionConfig()
    alone = training_draws(batch_of([7]), diffusion, seed=1)
    among = training_draws(batch_of([3, 7, 9]), diffusion, seed=1)
    for one, many in zip(alone, among, strict=True):
        assert torch.equal(one[0], many[1])
    for other in (batch_of([7], [1]), batch_of([8])):
        noise, sigmas, _ = training_draws(other, diffusion, seed=1)
        assert not torch.equal(noise, alone[0]) and sigmas != alone[1]
    assert not torch.equal(training_draws(batch_of([7]), diffusion, seed=2)[0], alone[0])


def test_sigma_distribution_and_dropout_rate():
    diffusion = DiffusionConfig(sigma_mean=0.8, sigma_std=0.5, text_dropout=0.25)
    noise, sigmas, dropped = training_draws(batch_of(list(range(4000))), diffusion, seed=1)
    logits = torch.logit(sigmas)
    assert logits.mean().item() == pytest.approx(0.8, abs=0.03) and logits.std().item() == pytest.approx(0.5, abs=0.03)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1.0, abs=0.01)


def test_validation_never_changes():
    first, again = (validation_draws(batch_of([5, 6], [0, epoch]), DiffusionConfig(), seed=1) for epoch in (0, 3))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert not first[2].any()


def test_dropped_text_is_the_null_text():
    batch = batch_of([1, 2])
    null = pad_rows(torch.full((2, MODEL.text_embed_dim), 9.0), 6)
    noise, sigmas, _ = training_draws(batch, DiffusionConfig(), seed=1)
    noisy = make_noisy(batch, (noise, sigmas, torch.tensor([False, True])), null, MODEL, DiffusionConfig())
    text = noisy.condition.text
    assert torch.equal(text[0], batch.text[0]) and torch.equal(text[1], null)
    assert text[1, 2:].abs().max() == 0


def test_images_and_dropped_first_frames_are_not_given():
    """An image whose own latents were its condition would be its own answer."""
    video = batch_of(list(range(400)))
    image = replace(video, latents=video.latents[:, :, :1])
    diffusion = DiffusionConfig(image_dropout=0.25)
    assert hidden_first_frames(image, diffusion, 1).all()
    hidden = hidden_first_frames(video, diffusion, 1)
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert hidden_first_frames(video, DiffusionConfig(), 1).sum() == 0
    for batch, expected in ((image, torch.ones(400, dtype=torch.bool)), (video, hidden)):
        draws = training_draws(batch, diffusion, seed=1)
        noisy = make_noisy(batch, draws, batch.text[0], MODEL, diffusion, hidden_first_frames(batch, diffusion, 1))
        given = noisy.condition.channels.abs().flatten(1).sum(1) + noisy.condition.image.abs().flatten(1).sum(1)
        assert torch.equal(given == 0, expected)
    draws = validation_draws(image, diffusion, seed=1)
    assert make_noisy(image, draws, image.text[0], MODEL, diffusion).condition.mask.abs().max() == 0


def test_model_input_is_noise_mask_condition():
    batch = batch_of([1])
    draws = training_draws(batch, DiffusionConfig(), seed=1)
    noisy = make_noisy(batch, draws, batch.text[0], MODEL, DiffusionConfig())
    c, m = MODEL.latent_channels, MODEL.mask_channels
    noise_part, mask, condition = noisy.condition.model_input(noisy.noisy_latents).split([c, m, c], dim=1)
    sigma = draws[1].item()
    torch.testing.assert_close(noise_part, (1 - sigma) * batch.latents + sigma * draws[0])
    assert mask[:, :, 0].min() == 1 and mask[:, :, 1:].abs().max() == 0
    assert torch.equal(condition[:, :, 0], batch.latents[:, :, 0]) and condition[:, :, 1:].abs().max() == 0
    torch.testing.assert_close(noisy.target, draws[0] - batch.latents)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_a_perfect_prediction_has_no_error(prediction_type):
    batch = batch_of([1, 2])
    diffusion = DiffusionConfig(prediction_type=prediction_type)
    noise, _, dropped = training_draws(batch, diffusion, seed=1)
    noisy = make_noisy(batch, (noise, torch.tensor([0.3, 0.9]), dropped), batch.text[0], MODEL, diffusion)
    right = noisy.target if prediction_type == "velocity" else batch.latents
    prediction = patchify(right, MODEL.patch_size)
    assert velocity_mse(prediction, noisy, denoiser_of(prediction_type)).max() < 1e-10
    # An error in one sample is that sample's alone, and a mean over all its elements.
    wrong = prediction.clone()
    wrong[0] += 0.1
    errors = velocity_mse(wrong, noisy, denoiser_of(prediction_type))
    expected = 0.01 if prediction_type == "velocity" else 0.01 / 0.3**2
    assert errors[0].item() == pytest.approx(expected, rel=1e-3) and errors[1] < 1e-10
