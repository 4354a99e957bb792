"""The latent upsampler and its losses (paper section 2.4.1)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import LatentUpsamplerConfig, LatentUpsamplingLossConfig
from megatron_fsvideo.losses.latent_upsampling import (
    decode_upsampled,
    encode_pair,
    half_sized,
    perceptual_weight,
    upsampling_loss,
)
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.latent_upsampler import LatentUpsampler
from tests.unit import fsae_fixtures

CHANNELS = 4
SCALE = LatentScale((0.5, -0.25, 0.0, 1.0), (2.0, 0.5, 1.0, 1.5))


def build(**changes) -> LatentUpsampler:
    """Random everywhere, fp64; one block after the doubling sees 4 frames ahead in all."""
    torch.manual_seed(0)
    values = {"latent_channels": CHANNELS, "mid_channels": 32, "blocks": (0, 1)}
    model = LatentUpsampler(LatentUpsamplerConfig(**(values | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def random_latents(num_frames: int, height: int = 2, width: int = 3) -> Tensor:
    shape = (2, CHANNELS, num_frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(num_frames), dtype=torch.float64)


class SmallTrunk(nn.Module):
    """Two smooth layers in VGG16's place, which is too slow for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 16, 3, 2)])

    def forward(self, frames: Tensor) -> list[Tensor]:
        first = self.layers[0](frames).tanh()
        return [first, self.layers[1](first).tanh()]


@pytest.fixture(scope="module")
def lpips() -> PerceptualLoss:
    torch.manual_seed(0)
    return PerceptualLoss(SmallTrunk().double(), [torch.rand(8), torch.rand(16)], "random")


@pytest.fixture(scope="module")
def fsae() -> FSAE:
    return fsae_fixtures.build(fsae_fixtures.config("lite"))


@pytest.mark.parametrize("changes", [{}, {"blocks": (1, 2)}, {"norm": "group"}, {"time_padding": "zero"}])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_property_33_rows_and_columns_are_doubled_and_nothing_else(changes: dict, num_frames: int) -> None:
    upsampled = build(**changes)(random_latents(num_frames, 2, 3))
    assert upsampled.shape == (2, CHANNELS, num_frames, 4, 6)
    # Four different values in each cell: no nearest neighbour.
    assert upsampled.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).std(dim=(4, 6)).min() > 1e-4


def test_property_33_the_papers_size_has_239_5_million_parameters() -> None:
    with torch.device("meta"):
        model = LatentUpsampler(LatentUpsamplerConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 239.5


@torch.no_grad()
def test_property_33_pixel_norm_sees_a_neighbourhood_in_both_directions_of_time() -> None:
    latents = random_latents(6)
    changed = latents.clone()
    changed[:, :, 5] += 1
    for norm, sees_all in (("pixel", False), ("group", True)):
        model = build(norm=norm)
        moved = (model(changed) - model(latents)).abs().amax(dim=(0, 1, 3, 4))
        assert (moved[1:] > 0).all(), "frames before the change: not causal"
        assert (moved[0] > 0) == sees_all
        for n in range(2):
            alone = (model(latents[n : n + 1]) - model(latents)[n : n + 1]).abs().max()
            assert alone < 1e-12, "samples do not meet"


@torch.no_grad()
def test_property_33_a_still_clip_stays_still_with_replicated_frames() -> None:
    image = random_latents(1)
    still = image.expand(-1, -1, 4, -1, -1)
    for time_padding, stays in (("replicate", True), ("zero", False)):
        model = build(time_padding=time_padding)
        upsampled = model(still)
        assert ((upsampled - model(image)).abs().max() < 1e-12) == stays
        assert ((upsampled - upsampled[:, :, :1]).abs().max() < 1e-12) == stays


def test_what_cannot_be_built_or_upsampled_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        LatentUpsamplerConfig(mid_channels=48, norm="group")
    with pytest.raises(ValueError, match="blocks"):
        LatentUpsamplerConfig(blocks=(-1, 3))
    with pytest.raises(ValueError, match=r"\[batch, 4, frames, height, width\], got \[2, 3, 1, 2, 2\]"):
        build()(torch.zeros(2, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="perceptual_ramp"):
        LatentUpsamplingLossConfig(perceptual_ramp=2.0)


def keys_half(side: int) -> np.ndarray:
    """[side / 2, side]: Keys' cubic with a = -1/2, stretched over twice the positions, weights summing to 1."""
    centres = 2 * np.arange(side // 2) + 0.5
    x = np.abs(np.arange(side)[None] - centres[:, None]) / 2
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
    return weights / weights.sum(axis=1, keepdims=True)


def test_property_33_low_resolution_is_bicubic_with_antialias() -> None:
    video = 0.5 * fsae_fixtures.random_video(5, 16, 24, batch=2)
    expected = np.einsum("ih,bcfhw,jw->bcfij", keys_half(16), video.numpy(), keys_half(24))
    assert np.abs(expected).max() < 1
    assert np.allclose(half_sized(video).numpy(), expected, atol=1e-12)
    aliased = F.interpolate(video[:, :, 0], (8, 12), mode="bicubic")
    assert (half_sized(video)[:, :, 0] - aliased).abs().max() > 0.05


def test_property_33_low_resolution_stays_in_range() -> None:
    edge = torch.ones(1, 3, 1, 16, 16, dtype=torch.float64)
    edge[..., 8:] = -1
    assert np.abs(edge[0, 0, 0].numpy() @ keys_half(16).T).max() > 1.01, "an edge overshoots"
    assert half_sized(edge).abs().max() == 1


def test_property_33_the_perceptual_weight_rises_over_the_first_half() -> None:
    config = LatentUpsamplingLossConfig()
    weights = [perceptual_weight(config, iteration, 1000) for iteration in range(1000)]
    assert weights[0] == pytest.approx(0.1) and weights[250] == pytest.approx(0.55)
    assert np.allclose(np.diff(weights[:501]), 0.9 / 500)
    assert np.allclose(weights[500:], 1.0) and weights[499] < 1
    assert perceptual_weight(LatentUpsamplingLossConfig(perceptual_ramp=0.0), 0, 1000) == 1


def test_property_33_the_loss_is_the_weighted_sum(lpips: PerceptualLoss) -> None:
    video, other = fsae_fixtures.random_video(5, 16, 16), fsae_fixtures.random_video(5, 16, 16, seed=1)
    latents, upsampled = random_latents(2), random_latents(2).flip(0)
    config = LatentUpsamplingLossConfig()
    for frames in (0, 2):
        loss, parts = upsampling_loss(config, (upsampled, latents), (other, video), lpips, 0.7, frames)
        expected = {
            "latent": (upsampled - latents).abs().mean(),
            "l1": (other - video).abs().mean(),
            "perceptual": lpips(other, video),
        }
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            assert value > 1e-4 and parts[name].item() == pytest.approx(value.item(), rel=1e-5)
        total = 0.1 * expected["latent"] + 0.1 * expected["l1"] + 0.7 * expected["perceptual"]
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    with pytest.raises(ValueError, match="shapes differ"):
        upsampling_loss(config, (upsampled[:1], latents), (other, video), lpips, 0.7)


def test_property_33_normalised_latents_come_back() -> None:
    latents = random_latents(2)
    normalised = SCALE.normalize(latents)
    assert torch.allclose(normalised[:, 1], (latents[:, 1] + 0.25) / 0.5)
    assert torch.allclose(SCALE.restore(normalised), latents)


def test_property_33_pairs_come_from_the_clip_and_its_half(fsae: FSAE) -> None:
    video = fsae_fixtures.random_video(5, 32, 16)
    pair = encode_pair(fsae, video, SCALE)
    assert pair.high.shape == (1, CHANNELS, 2, 4, 2) and pair.low.shape == (1, CHANNELS, 2, 2, 1)
    assert torch.allclose(SCALE.restore(pair.high), fsae.encode(video))
    assert torch.allclose(SCALE.restore(pair.low), fsae.encode(half_sized(video)))
    for ours, theirs in zip(pair.first_frame_features, fsae.first_frame_features(video[:, :, :1]), strict=True):
        assert torch.equal(ours, theirs)
    decoded = decode_upsampled(fsae, pair.high, SCALE, pair.first_frame_features, noise_seed=3)
    assert torch.allclose(decoded, fsae.decode(fsae.encode(video), pair.first_frame_features, 3))
    with pytest.raises(ValueError, match="multiples of 16.*multiples of 8: got 24x16; crop to 16x16"):
        encode_pair(fsae, video[..., :24, :], SCALE)


def test_property_33_the_gradient_passes_the_frozen_decoder(fsae: FSAE, lpips: PerceptualLoss) -> None:
    video = fsae_fixtures.random_video(5, 16, 16)
    pair = encode_pair(fsae, video, SCALE)
    model = build()
    # Only what is measured behind the decoder.
    config = LatentUpsamplingLossConfig(latent_weight=0.0)

    def loss() -> Tensor:
        upsampled = model(pair.low)
        decoded = decode_upsampled(fsae, upsampled, SCALE, pair.first_frame_features)
        return upsampling_loss(config, (upsampled, pair.high), (decoded, video), lpips, 0.5)[0]

    loss().backward()
    assert all(p.grad is None and not p.requires_grad for p in (*fsae.parameters(), *lpips.parameters()))
    torch.manual_seed(1)
    step = 1e-6
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    for parameter in (model.conv_in.weight, model.up.weight, model.conv_out.bias):
        direction, start = torch.randn_like(parameter), parameter.detach().clone()
        with torch.no_grad():
            losses = [_moved(parameter, start + sign * step * direction, loss) for sign in (1, -1, 0)]
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-3)


def _moved(parameter: Tensor, value: Tensor, loss) -> float:
    parameter.copy_(value)
    return loss().item()


def test_property_33_a_decoder_that_would_be_trained_is_refused(fsae: FSAE) -> None:
    trained = fsae_fixtures.build(fsae.config)
    trained.decoder.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        decode_upsampled(trained, random_latents(2), SCALE, [])
