"""The codec: slices give what the whole gives, decoders see the first frame, one scale, one identity."""

from collections import Counter

import pytest
import torch

from megatron_fsvideo.config import Compression
from megatron_fsvideo.models.codecs import FSAECodec, LatentScale, fsae, is_same_encoder
from megatron_fsvideo.models.codecs.identity import fingerprint
from tests.unit.fsae_fixtures import build, config, count_attention, difference, random_latents, random_video

KINDS = ("causal", "standard", "lite")


@pytest.fixture
def small_slices(monkeypatch):
    """One latent of a 16 x 24 clip goes through at once."""
    monkeypatch.setattr(fsae, "PIXELS_PER_SLICE", 4 * 16 * 24)


@pytest.mark.parametrize("batch", [1, 3])
def test_slices_encode_as_the_whole(batch, monkeypatch):
    model = build(config())
    video = random_video(13, batch=batch)
    whole = FSAECodec(model).encode(video)
    assert torch.equal(whole, model.encode(video)), "what fits goes through at once"
    sizes = Counter()
    model.encoder.register_forward_hook(lambda module, inputs, output: sizes.update([tuple(inputs[0].shape[::2])]))
    for samples in (1, 2):
        monkeypatch.setattr(fsae, "PIXELS_PER_SLICE", samples * 4 * 16 * 24)
        sizes.clear()
        assert difference(FSAECodec(model).encode(video), whole) < 1e-12
        assert max(shape[0] * shape[1] for shape in sizes) <= 4 * samples, sizes


def test_a_stream_of_any_parts_encodes_as_the_whole(small_slices):
    model = build(config())
    video = random_video(13)
    parts = list(FSAECodec(model).encode_stream(video.split([2, 5, 1, 5], dim=2)))
    assert difference(torch.cat(parts, dim=2), model.encode(video)) < 1e-12
    short = torch.cat(list(FSAECodec(model).encode_stream([video[:, :, :11]])), dim=2)
    assert short.shape[2] == 4, "the last frame is repeated"


@pytest.mark.parametrize("kind", ["causal", "lite"])
def test_slices_decode_as_the_whole(kind, small_slices):
    model = build(config(kind))
    latents, frame = random_latents(model.config, 5), random_video(1)
    features = model.first_frame_features(frame) if kind == "lite" else None
    parts = list(FSAECodec(model).decode_stream(latents.split([2, 3], dim=2), frame))
    assert [part.shape[2] for part in parts] == [1, 4, 4, 4, 4]
    assert difference(torch.cat(parts, dim=2), model.decode(latents, features)) < 1e-12


def test_tiles_of_a_standard_decoder_meet(small_slices):
    model = build(config("standard"))
    latents, frame = random_latents(model.config, 7), random_video(1)
    tiles = Counter()
    model.decoder.register_forward_hook(lambda module, inputs, output: tiles.update([inputs[0].shape[2]]))
    decoded = FSAECodec(model).decode(latents, frame)
    assert tiles == {3: 3} and decoded.shape == (1, 3, 25, 16, 24)
    first_tile = model.decode(latents[:, :, :3], model.first_frame_features(frame))
    assert difference(decoded[:, :, :5], first_tile[:, :, :5]) < 1e-12, "what only the first tile has"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_known", [True, False])
def test_every_attention_to_the_first_frame_is_called(kind, is_known):
    model = build(config(kind))
    calls = count_attention(model)
    codec, latents, frame = FSAECodec(model), random_latents(model.config, 3), random_video(1)
    decoded = codec.decode(latents, frame if is_known else None)
    assert len(model.decoder.first_frame) == (0 if kind == "causal" else 2)
    assert calls == dict.fromkeys(range(len(model.decoder.first_frame)), 1)
    if kind != "causal":
        found = model.decode(latents[:, :, :1]).clamp(-1, 1)
        features = model.first_frame_features(frame if is_known else found)
        assert torch.equal(decoded, model.decode(latents, features))
        assert difference(decoded, model.decode(latents)) > 1e-3, "the attention matters"


def test_gradients_reach_the_latents():
    codec = FSAECodec(build(config("lite")))
    latents = random_latents(codec.fsae.config, 3).requires_grad_()
    codec.decode(latents, random_video(1)).square().mean().backward()
    assert latents.grad.abs().min() > 0


def test_the_scale_normalises_what_is_encoded_and_restores_what_is_decoded():
    codec = FSAECodec(build(config("standard")))
    scale = LatentScale((0.5, -0.25, 0.0, 1.0), (2.0, 0.5, 1.0, 1.5))
    scaled, video = codec.with_scale(scale), random_video(5)
    latents = codec.encode(video)
    normal = scaled.encode(video)
    torch.testing.assert_close(normal[:, 1], (latents[:, 1].float() + 0.25) / 0.5)
    assert difference(scale.restore(scale.normalize(latents)), latents) < 1e-12
    expected = codec.decode(scale.restore(normal), video[:, :, :1], 3)
    assert torch.equal(scaled.decode(normal, video[:, :, :1], 3), expected)
    assert torch.equal(torch.cat(list(scaled.decode_stream(normal, video[:, :, :1], 3)), dim=2), expected)


def record(model):
    return FSAECodec(model).identity.record()


def test_the_encoder_says_whose_latents_they_are():
    """Phases 5 and 6 train a decoder for phase 4's encoder: a DiT of its latents takes all three."""
    models = {kind: build(config(kind), seed) for seed, kind in enumerate(KINDS)}
    for kind in ("standard", "lite"):
        assert not is_same_encoder(record(models["causal"]), record(models[kind]))
        models[kind].encoder.load_state_dict(models["causal"].encoder.state_dict())
        assert is_same_encoder(record(models["causal"]), record(models[kind]))
    # Records of earlier versions: all weights in one fingerprint.
    old = {"fingerprint": fingerprint(models["causal"])}
    assert is_same_encoder(old, record(models["causal"])) and is_same_encoder(record(models["causal"]), old)
    assert not is_same_encoder(old, record(models["standard"])), "nothing in an old record says what its encoder was"
    assert is_same_encoder(old, dict(old))


def test_sizes():
    compression = Compression(64)
    assert compression.latent_shape(121, 704, 1280) == (31, 11, 20)
    assert [compression.latent_frames(n) for n in (1, 2, 5, 6)] == [1, 2, 2, 3]
    assert [compression.video_frames(n) for n in (1, 2, 31)] == [1, 5, 121]
    with pytest.raises(ValueError, match="a clip: height 720 is not a multiple .* 64; try 704 or 768"):
        compression.check(121, 720, 1280, "a clip")
    with pytest.raises(ValueError, match="a clip of 120 frames: the count must be 4k.1; try 117 or 121"):
        compression.check(120, 704, 1280)
