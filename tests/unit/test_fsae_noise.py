"""Noise of its own in every number of the decoder's features (noise_shape full): the whole's in slices and tiles."""

import pytest
import torch

from megatron_fsvideo.models.fsae.context import DecodeContext, Window
from megatron_fsvideo.models.fsae.patch import PatchBox, decode_patch
from megatron_fsvideo.models.fsae.streaming import Stream, StreamCache
from tests.unit.fsae_fixtures import build, config, difference, patch_config, random_latents


def test_each_number_has_its_own() -> None:
    like, window = torch.empty(2, 8, 9, 16, 24).double(), Window(0, 0, 16, 24)
    noise = DecodeContext().noise_volume("site", window, like, 4)
    assert noise.shape == (1, *like.shape[1:]) and abs(float(noise.std()) - 1) < 0.02
    frames, channels = noise.flatten(3)[0].unbind(1), noise.flatten(2)[0].unbind(0)
    for a, b in ((frames[0], frames[1]), (frames[4], frames[8]), (channels[0], channels[1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.1
    other = DecodeContext(noise_seed=1).noise_volume("site", window, like, 4)
    assert not torch.equal(noise, other)
    assert not torch.equal(noise, DecodeContext().noise_volume("other site", window, like, 4))


@pytest.mark.parametrize(("rate", "first"), [(4, 5), (2, 3), (1, 2)])
def test_slices_and_tiles_see_the_noise_of_the_whole(rate: int, first: int) -> None:
    """Latent 2 begins at frame 5 of the video, 3 of half its frames, 2 of a quarter."""
    like = torch.empty(1, 3, 1 + 3 * rate, 8, 8).double()
    whole = DecodeContext().noise_volume("site", Window(0, 0, 8, 8), like, rate)
    part = DecodeContext(Stream(2)).noise_volume("site", Window(2, 3, 8, 8), like[:, :, first:, 2:6, 3:8], rate)
    assert torch.equal(part, whole[:, :, first:, 2:6, 3:8])


@pytest.mark.parametrize("noise_shape", ["spatial", "full"])
def test_a_sample_has_its_noise_whatever_it_is_decoded_with(noise_shape: str) -> None:
    fsae = build(config("lite", noise_shape=noise_shape))
    latents = random_latents(fsae.config, 2).expand(3, -1, -1, -1, -1)
    together = fsae.decode(latents, noise_seed=(7, 8, 7))
    for video, seed in zip(together, (7, 8, 7), strict=True):
        assert difference(video[None], fsae.decode(latents[:1], noise_seed=seed)) < 1e-9
    assert difference(together[0], together[1]) > 1e-3


def test_a_lite_decoder_streams_exactly() -> None:
    fsae = build(config("lite", noise_shape="full"))
    latents = random_latents(fsae.config, 4)
    whole = fsae.decode(latents)
    assert difference(whole, build(config("lite")).decode(latents)) > 1e-3, "another noise than the map's"
    cache = StreamCache()
    parts = [fsae.decode_chunk(chunk, cache) for chunk in latents.split([1, 2, 1], dim=2)]
    assert difference(torch.cat(parts, dim=2), whole) < 1e-9


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_a_patch_is_that_of_the_whole(kind: str) -> None:
    fsae = build(patch_config(kind, noise_shape="full"))
    latents = random_latents(fsae.config, 3, 4, 4)
    video, region = decode_patch(fsae, latents, PatchBox(0, 3, 0, 8, 0, 5))
    assert difference(video, region.of(fsae.decode(latents))) < 1e-9
