"""Flow matching, losses, conditions, samplers: identities, limits and analytic distributions."""

import math

import pytest
import torch

from megatron_fsvideo.diffusion import conditions, flow_matching, guidance, losses, samplers


def test_noise_ends_and_velocity_is_the_derivative():
    latents, noise = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(flow_matching.add_noise(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(flow_matching.add_noise(latents, noise, torch.ones(2)), noise)
    low, high = torch.tensor([0.2, 0.6]).double(), torch.tensor([0.3, 0.9]).double()
    difference = flow_matching.add_noise(latents, noise, high) - flow_matching.add_noise(latents, noise, low)
    slope = difference / (high - low).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(slope, flow_matching.velocity_target(latents, noise))


def test_logit_normal_quantiles_and_shift_is_a_shifted_mean():
    normals = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    sigmas = flow_matching.logit_normal_sigmas(normals, mean=0.8, std=1.3)
    for z in (-1.0, 0.0, 1.0):
        share = (sigmas < 1 / (1 + math.exp(-(0.8 + 1.3 * z)))).double().mean().item()
        assert share == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=4e-3)
    shifted = flow_matching.logit_normal_sigmas(normals, 0.0, 1.0, shift=3.0)
    torch.testing.assert_close(shifted, flow_matching.logit_normal_sigmas(normals, math.log(3.0), 1.0))


def test_timesteps_are_fp32_and_fine():
    sigmas = torch.tensor([0.9990, 0.9991])
    assert flow_matching.to_timesteps(sigmas.bfloat16()).dtype == torch.float32
    assert flow_matching.to_timesteps(sigmas).diff().item() == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("sigma", [0.06, 0.5, 1.0])
def test_a_perfect_sample_prediction_gives_the_velocity(sigma):
    latents, noise = torch.randn(2, 3, 2, 2, 4, 4)
    sigmas = torch.full((3,), sigma)
    noisy = flow_matching.add_noise(latents, noise, sigmas)
    velocity = flow_matching.to_velocity(latents, noisy, sigmas, "sample")
    torch.testing.assert_close(velocity, noise - latents, rtol=1e-3, atol=1e-4)


def test_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="epsilon"):
        flow_matching.to_velocity(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "epsilon")


def test_white_latents_bound_is_what_the_best_linear_predictor_reaches():
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for sigma in (0.1, 0.5, 0.8):
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        best = (noisy @ target / (noisy @ noisy)) * noisy
        bound = flow_matching.white_latents_bound(torch.tensor(sigma, dtype=torch.float64)).item()
        assert (target - best).square().mean().item() == pytest.approx(bound, rel=1e-2)


def test_pseudo_huber_limits_and_gradient():
    mse = torch.tensor([1e-6, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(2e3 * losses.pseudo_huber(mse, 1e3), mse, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(losses.pseudo_huber(mse, 1e-6)[1:], mse.sqrt()[1:], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.pseudo_huber(mse, 0.03).sum(), mse)
    torch.testing.assert_close(gradient, 0.5 / torch.sqrt(mse.detach() + 0.03**2))


@pytest.mark.parametrize("loss_type", ["pseudo_huber", "ict", "rfpp"])
def test_clipping_and_adams_epsilon_mean_the_same_with_every_loss(loss_type):
    """At the errors that training sees the gradient is of the squared error's size, whatever the constant is."""
    mse = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.loss_of_mse(mse, 63_488, loss_type, 0.03).sum(), mse)
    assert 0.3 < gradient.min() and gradient.max() < 1.0


def test_a_sample_cut_in_two_has_the_loss_of_the_whole_not_the_mean_of_the_parts():
    prediction, target = torch.randn(2, 3, 8, 4)
    whole = losses.loss_of_mse(losses.squared_errors(prediction, target) / 32, 32, "pseudo_huber", 0.03)
    parts = [losses.squared_errors(prediction[:, cut], target[:, cut]) for cut in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(losses.loss_of_mse(sum(parts) / 32, 32, "pseudo_huber", 0.03), whole)
    averaged = (losses.pseudo_huber(parts[0] / 12, 0.03) + losses.pseudo_huber(parts[1] / 20, 0.03)) / 2
    assert not torch.allclose(averaged, whole, rtol=1e-3)


def test_loss_presets_are_the_references_constants():
    """Both papers' constants: c of the norm of a sample with d elements, and the same in units of its RMS error."""
    for d, ict, rfpp in ((3072, 0.030, 1.66), (2048, 0.024, 1.11), (63_488, 0.136, 34.3), (253_952, 0.272, 137)):
        root = d**0.5
        assert losses.huber_constant("ict", d, 0.5) * root == pytest.approx(ict, rel=0.03)
        assert losses.huber_constant("rfpp", d, 0.5) * root == pytest.approx(rfpp, rel=0.01)
        errors = torch.tensor([0.5 * d], dtype=torch.float64)
        c = losses.huber_constant("rfpp", d, 0.5) * root
        expected = (math.sqrt(0.5 * d + c**2) - c) / root
        assert losses.loss_of_mse(errors / d, d, "rfpp", 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert losses.huber_constant("pseudo_huber", 99, 0.5) == 0.5
    assert losses.loss_of_mse(torch.tensor([2.0]), 3, "mse", 0.5).item() == 2.0
    with pytest.raises(ValueError, match="pseudo_huber, ict, rfpp or mse, got 'l1'"):
        losses.loss_of_mse(torch.ones(1), 1, "l1", 0.5)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_hidden_first_frame_leaves_no_trace(repeat):
    latents = torch.randn(3, 2, 4, 2, 2)
    image = torch.randn(3, 5, 6)
    hidden = torch.tensor([True, False, True])
    found = conditions.first_frame_condition(latents, 4, None, image, repeat=repeat, hidden=hidden)
    shown = conditions.first_frame_condition(latents, 4, None, image, repeat=repeat)
    for some, every in ((found.mask, shown.mask), (found.latents, shown.latents), (found.image, shown.image)):
        assert some[::2].abs().max() == 0 and torch.equal(some[1], every[1])
    assert torch.equal(shown.image, image)


@pytest.mark.parametrize("frames", [1, 2, 31])
def test_first_frame_condition_reads_only_frame_zero(frames):
    latents = torch.randn(2, 3, frames, 4, 5)
    shown = conditions.first_frame_condition(latents, 4)
    mask, condition = shown.mask, shown.latents
    assert mask.shape == (2, 4, frames, 4, 5)
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].eq(0).all()
    assert torch.equal(condition[:, :, 0], latents[:, :, 0]) and condition[:, :, 1:].eq(0).all()
    other = latents.clone()
    other[:, :, 1:] += 1
    assert torch.equal(conditions.first_frame_condition(other, 4).latents, condition)
    repeated = conditions.first_frame_condition(latents, 4, repeat=True)
    assert torch.equal(repeated.mask, mask) and torch.equal(repeated.latents[:, :, -1], latents[:, :, 0])


def test_model_input_order_is_noise_mask_condition():
    condition = conditions.Condition(torch.ones(1, 4, 1, 1, 1), torch.full((1, 2, 1, 1, 1), 2.0), None, None)
    assert condition.model_input(torch.zeros(1, 2, 1, 1, 1)).flatten().tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert condition.channels.flatten().tolist() == [1, 1, 1, 1, 2, 2]


def test_euler_is_exact_for_a_straight_path():
    latents, noise = torch.randn(2, 2, 3, 1, 2, 2, dtype=torch.float64)
    sigmas = samplers.euler_sigmas(7, shift=3.0).double()
    result = samplers.euler_sample(lambda x, s: noise - latents, noise, sigmas)
    torch.testing.assert_close(result, latents)


def test_euler_converges_to_the_analytic_solution_of_gaussian_data():
    # Data N(0, 0.25): the flow maps noise x to 0.5 x.
    def velocity(x, sigmas):
        s = sigmas.view(-1, 1)
        return (s - 0.25 * (1 - s)) / (s**2 + 0.25 * (1 - s) ** 2) * x

    noise = torch.randn(4, 3, dtype=torch.float64)
    errors = [
        (samplers.euler_sample(velocity, noise, samplers.euler_sigmas(n).double()) - 0.5 * noise).abs().max().item()
        for n in (50, 100, 200)
    ]
    assert errors[2] < 5e-3 * noise.abs().max()
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_euler_sigmas_end_points_and_errors():
    sigmas = samplers.euler_sigmas(30, shift=5.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="0"):
        samplers.euler_sigmas(0)


def test_guidance_extrapolates_and_scale_one_never_calls_the_unconditional():
    def forbidden(x, sigmas):
        raise AssertionError("called")

    x, sigmas = torch.ones(1), torch.ones(1)
    assert guidance.guided(lambda x, s: 3 * x, forbidden, 1.0)(x, sigmas).item() == 3
    assert guidance.guided(lambda x, s: 3 * x, lambda x, s: x, 5.0)(x, sigmas).item() == 11
