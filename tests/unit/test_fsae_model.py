"""The causal autoencoder's properties (paper section 2.2). Weights are random and in fp64, so results are exact."""

import pytest
import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.codecs.identity import fingerprint
from megatron_fsvideo.models.fsae import FSAE, StreamCache, begin_video
from megatron_fsvideo.models.fsae.attention import EViTBlock, LinearAttention
from megatron_fsvideo.models.fsae.convolutions import CausalConv3d
from megatron_fsvideo.models.fsae.inflation import fold_interpolation
from megatron_fsvideo.models.fsae.layers import (
    PixelNorm,
    channels_to_space,
    group_mean,
    repeat_channels,
    space_to_channels,
)
from megatron_fsvideo.models.fsae.resampling import InterpolateUp, SubPixelUp
from tests.unit.fsae_fixtures import decode_chunks

WITH_PIXEL_STAGE = FSAEConfig(
    widths=(8, 8, 16, 16),
    encoder_depths=(1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1),
    attention_stages=2,
    latent_channels=4,
    attention_head_dim=8,
)
WITHOUT_PIXEL_STAGE = FSAEConfig(
    widths=(8, 24, 16, 16),
    encoder_depths=(0, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1),
    attention_stages=1,
    latent_channels=8,
    attention_head_dim=8,
    residual_init=0.1,
    resample_init=0.3,
    patchify_init=True,
)
CONFIGS = pytest.mark.parametrize("config", [WITH_PIXEL_STAGE, WITHOUT_PIXEL_STAGE], ids=["pixel_stage", "stem_down"])


def build(config: FSAEConfig, seed: int = 0) -> FSAE:
    """Random everywhere: gains, biases and taps included, so that no path is silent."""
    torch.manual_seed(seed)
    fsae = FSAE(config).double().eval().requires_grad_(False)
    for parameter in fsae.parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.5 + torch.rand_like(parameter))
    return fsae


def random_video(num_frames: int, side: int = 16, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch, 3, num_frames, side, side, generator=generator, dtype=torch.float64) * 2 - 1


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@CONFIGS
@pytest.mark.parametrize("k", range(5))
def test_property_01_frames_and_sides(config: FSAEConfig, k: int) -> None:
    fsae = build(config)
    latents = fsae.encode(random_video(4 * k + 1, batch=2))
    assert latents.shape == (2, config.latent_channels, k + 1, 2, 2)
    assert fsae.decode(latents).shape == (2, 3, 4 * k + 1, 16, 16)


@CONFIGS
def test_property_02_first_frame_does_not_depend_on_the_rest(config: FSAEConfig) -> None:
    fsae, video = build(config), random_video(13)
    latents = fsae.encode(video)
    assert difference(fsae.encode(video[:, :, :1]), latents[:, :, :1]) < 1e-12
    assert difference(fsae.decode(latents[:, :, :1]), fsae.decode(latents)[:, :, :1]) < 1e-12

    alone = fsae.first_frame_features(video[:, :, :1])
    assert [feature.shape[2:] for feature in alone] == [(1, 4, 4), (1, 2, 2)]
    for feature, whole in zip(alone, fsae.encoder.stage_outputs(video, None)[-2:], strict=True):
        assert difference(feature, whole[:, :, :1]) < 1e-12


@CONFIGS
@pytest.mark.parametrize("frame", [0, 1, 4, 5, 8, 12])
def test_property_03_encoder_is_causal(config: FSAEConfig, frame: int) -> None:
    fsae, video = build(config), random_video(13)
    changed = video.clone()
    changed[:, :, frame] += 0.5
    effect = (fsae.encode(changed) - fsae.encode(video)).abs().amax(dim=(0, 1, 3, 4))
    first = -(-frame // 4)
    assert effect[:first].max() < 1e-12 if first else True
    assert effect[first] > 1e-6, "the frame's own latent must see it"


@CONFIGS
@pytest.mark.parametrize("latent", [0, 1, 3])
def test_property_03_decoder_is_causal(config: FSAEConfig, latent: int) -> None:
    fsae = build(config)
    latents = fsae.encode(random_video(13))
    changed = latents.clone()
    changed[:, :, latent] += 0.5
    effect = (fsae.decode(changed) - fsae.decode(latents)).abs().amax(dim=(0, 1, 3, 4))
    first = max(0, 4 * latent - 3)
    assert effect[:first].max() < 1e-12 if first else True
    assert effect[first] > 1e-6


@CONFIGS
@pytest.mark.parametrize("chunks", [(1, 4, 4, 4), (9, 4), (5, 8), (1, 12)])
def test_property_04_streaming_encode_is_exact(config: FSAEConfig, chunks: tuple[int, ...]) -> None:
    fsae, video = build(config), random_video(13)
    cache = StreamCache()
    streamed = torch.cat([fsae.encode_chunk(chunk, cache) for chunk in video.split(chunks, dim=2)], dim=2)
    assert difference(streamed, fsae.encode(video)) < 1e-12


@CONFIGS
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
def test_property_05_streaming_decode_is_exact(config: FSAEConfig, chunks: tuple[int, ...]) -> None:
    fsae = build(config)
    latents = fsae.encode(random_video(13))
    streamed = torch.cat(decode_chunks(fsae, latents.split(chunks, dim=2)), dim=2)
    assert difference(streamed, fsae.decode(latents)) < 1e-12


@CONFIGS
def test_property_06_interleaved_streams_do_not_share_memory(config: FSAEConfig) -> None:
    fsae = build(config)
    videos = [random_video(9), random_video(9).flip(2) * 0.7]
    caches, latents = [StreamCache(), StreamCache()], [[], []]
    decoders, decoded = [StreamCache(), StreamCache()], [[], []]
    for start, end in ((0, 1), (1, 5), (5, 9)):
        for k, video in enumerate(videos):
            chunk = video[:, :, start:end].clone()
            latents[k].append(fsae.encode_chunk(chunk, caches[k]))
            chunk.zero_()  # the caller may reuse its buffer
            decoded[k].append(fsae.decode_chunk(latents[k][-1].clone(), decoders[k]))
    for k, video in enumerate(videos):
        whole = fsae.encode(video)
        assert difference(torch.cat(latents[k], dim=2), whole) < 1e-12
        assert difference(torch.cat(decoded[k], dim=2), fsae.decode(whole)) < 1e-12


def test_cache_does_not_keep_the_whole_chunk_alive() -> None:
    fsae, cache = build(WITH_PIXEL_STAGE), StreamCache()
    fsae.encode_chunk(random_video(9), cache)
    assert cache.tails
    for tail in cache.tails.values():
        assert tail.shape[2] in (1, 2)
        assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


@pytest.mark.parametrize("in_channels, out_channels", [(8, 4), (4, 4), (4, 8)])
def test_property_08_interpolating_up_is_a_folded_sub_pixel_up(in_channels: int, out_channels: int) -> None:
    torch.manual_seed(0)
    interpolating = InterpolateUp(in_channels, out_channels, 1.0).double()
    sub_pixel = SubPixelUp(in_channels, out_channels, (1, 2, 2), 1.0).double()
    with torch.no_grad():
        taps = interpolating.conv.weight.unbind(dim=2)
        sub_pixel.conv.weight.copy_(torch.stack([fold_interpolation(tap) for tap in taps], dim=2))
        sub_pixel.conv.bias.copy_(interpolating.conv.bias.repeat_interleave(4))
        x = torch.randn(2, in_channels, 3, 5, 4, dtype=torch.float64)
        assert difference(sub_pixel(x), interpolating(x)) < 1e-12


def test_property_14_shuffles_are_inverse_and_their_order_keeps_images() -> None:
    video = torch.randn(2, 4, 4, 6, 8)
    for factor in ((2, 2, 2), (1, 2, 2)):
        channels = space_to_channels(video, factor)
        assert torch.equal(channels_to_space(channels, factor), video)
    # Time fastest: the group mean of a static clip is the 2D one (DC-AE's), which the natural order is not.
    static = video[:, :, :1].expand(-1, -1, 4, -1, -1)
    image = group_mean(space_to_channels(static, (1, 2, 2)), 8)[:, :, ::2]
    assert torch.allclose(group_mean(space_to_channels(static, (2, 2, 2)), 8), image, atol=1e-6)
    natural = space_to_channels(static, (2, 2, 2)).unflatten(1, (4, 4, 2)).transpose(2, 3).flatten(1, 3)
    assert not torch.allclose(group_mean(natural, 8), image, atol=1e-2)


def test_property_14_shortcuts_keep_constants() -> None:
    constant = torch.full((1, 8, 4, 4, 4), 0.7)
    assert torch.allclose(group_mean(space_to_channels(constant, (2, 2, 2)), 16), torch.tensor(0.7))
    assert torch.allclose(channels_to_space(repeat_channels(constant, 32), (2, 2, 2)), torch.tensor(0.7))


def test_property_13_pixel_norm_sees_one_position() -> None:
    torch.manual_seed(0)
    norm = PixelNorm(6).double().requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = expected * norm.weight.view(1, -1, 1, 1, 1) + norm.bias.view(1, -1, 1, 1, 1)
    assert difference(norm(x), expected) < 1e-12
    assert difference(norm(x[:, :, 1:2, 2:3, 3:4]), norm(x)[:, :, 1:2, 2:3, 3:4]) < 1e-12
    order = torch.randperm(5)
    assert difference(norm(x[..., order]), norm(x)[..., order]) < 1e-12


def test_property_15_attention_is_per_frame() -> None:
    torch.manual_seed(0)
    attention = LinearAttention(16, 8).double()
    frames = torch.randn(5, 16, 4, 6, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert difference(attention(frames[order]), attention(frames)[order]) < 1e-12

    # In the block only the causal convolution mixes frames: a change of the last frame reaches the last frame alone.
    block = EViTBlock(16, 8, PixelNorm(16), PixelNorm(16)).double()
    clip = torch.randn(1, 16, 4, 4, 6, dtype=torch.float64)
    changed = clip.clone()
    changed[:, :, -1] += 1.0
    effect = (block(changed) - block(clip)).abs().amax(dim=(0, 1, 3, 4))
    assert effect[:-1].max() < 1e-12 and effect[-1] > 1e-3


def test_causal_convolution_repeats_the_first_frame() -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3).double()
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    padded = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    expected = torch.nn.functional.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))
    assert difference(conv(x), expected) < 1e-12
    assert difference(conv(x[:, :, :1]), expected[:, :, :1]) < 1e-12  # the single frame's short way


@CONFIGS
def test_begin_video_keeps_images_and_starts_frame_by_frame(config: FSAEConfig) -> None:
    fsae, image = build(config), random_video(1)
    latent = fsae.encode(image)
    reconstruction = fsae.decode(latent)
    static = latent.expand(-1, -1, 3, -1, -1)
    moving = torch.cat([latent, random_latent(latent), random_latent(latent, 2)], dim=2)
    assert difference(fsae.decode(static), reconstruction.expand(-1, -1, 9, -1, -1)) > 1e-3, "vacuous otherwise"

    begin_video(fsae)
    assert difference(fsae.encode(image), latent) < 1e-12
    assert difference(fsae.decode(latent), reconstruction) < 1e-12
    assert difference(fsae.decode(static), reconstruction.expand(-1, -1, 9, -1, -1)) < 1e-12
    # Each latent's frames are the image that it decodes to alone.
    for k in range(3):
        alone = fsae.decode(moving[:, :, k : k + 1])
        frames = fsae.decode(moving)[:, :, max(0, 4 * k - 3) : 4 * k + 1]
        assert difference(frames, alone.expand_as(frames)) < 1e-12


def random_latent(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def test_stem_starts_as_the_pixels_of_its_cell() -> None:
    torch.manual_seed(0)
    config = FSAEConfig(
        widths=(8, 24, 24, 24),
        encoder_depths=(0, 0, 0, 0),
        decoder_depths=(0, 0, 0, 0),
        attention_stages=0,
        latent_channels=8,
        patchify_init=True,
    )
    stem, video = FSAE(config).encoder.stem, random_video(5).float()
    with torch.no_grad():
        cells = stem(video)[:, :, 1:]  # half-rate frames 1, 2: frames (1, 2), (3, 4)
    pixels = space_to_channels(video[:, :, 1:], (2, 2, 2))
    cells, pixels = cells.flatten(2), pixels.flatten(2)
    distances = torch.cdist(cells, pixels)[0]
    assert torch.equal(distances.min(dim=1).values < 1e-5, torch.ones(24, dtype=torch.bool))
    assert sorted(distances.argmin(dim=1).tolist()) == list(range(24)), "every pixel of the cell is kept"


def test_bf16_autocast_stays_close() -> None:
    fsae, video = build(WITHOUT_PIXEL_STAGE).float(), random_video(5).float()
    expected = fsae.decode(fsae.encode(video))
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction = fsae.decode(fsae.encode(video))
    assert reconstruction.dtype == torch.bfloat16
    assert difference(reconstruction.float(), expected) < 0.1


def test_gradients_reach_every_weight() -> None:
    for config in (WITH_PIXEL_STAGE, WITHOUT_PIXEL_STAGE):
        fsae = build(config).requires_grad_(True)
        video = random_video(9)
        reconstruction, latents = fsae(video, torch.ones(1, config.latent_channels, 3, 2, 2))
        (reconstruction - video).abs().mean().backward()
        silent = [name for name, p in fsae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not silent, silent


def test_latent_noise_is_in_units_of_the_latents() -> None:
    fsae, video = build(WITH_PIXEL_STAGE), random_video(5, batch=2)
    latents = fsae.encode(video)
    noise = torch.randn_like(latents)
    expected = fsae.decode(latents + latents.std(dim=(0, 2, 3, 4), keepdim=True) * noise)
    assert difference(fsae(video, noise)[0], expected) < 1e-6


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 6, 16, 16), "got 6; use the first 5 or read 9"),
        ((1, 3, 4, 16, 16), "got 4; use the first 1 or read 5"),
        ((1, 3, 5, 20, 16), r"20x16 .*factor 8; resize or crop to 16x16"),
        ((1, 1, 5, 16, 16), r"\[batch, 3, frames, height, width\], got \[1, 1, 5, 16, 16\]"),
    ],
)
def test_a_video_of_the_wrong_size_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(WITH_PIXEL_STAGE).encode(torch.zeros(shape, dtype=torch.float64))


def test_a_wrong_chunk_or_latent_is_refused() -> None:
    fsae, cache = build(WITH_PIXEL_STAGE), StreamCache()
    with pytest.raises(ValueError, match="got 4"):
        fsae.encode_chunk(random_video(4), cache)
    fsae.encode_chunk(random_video(5), cache)
    with pytest.raises(ValueError, match="a multiple of 4 frames, got 5"):
        fsae.encode_chunk(random_video(5), cache)
    with pytest.raises(ValueError, match=r"latents must be \[batch, 4, .*got \[1, 8"):
        fsae.decode(torch.zeros(1, 8, 2, 2, 2, dtype=torch.float64))


def test_widths_that_do_not_fit_are_refused() -> None:
    def config(**changes) -> FSAEConfig:
        values = {"widths": (8, 8, 16), "encoder_depths": (1, 1, 1), "decoder_depths": (1, 1, 1)}
        values |= {"attention_stages": 1, "latent_channels": 4, "attention_head_dim": 8}
        return FSAEConfig(**(values | changes))

    with pytest.raises(ValueError, match="last width 16 is not a multiple of latent_channels 6"):
        FSAE(config(latent_channels=6))
    with pytest.raises(ValueError, match="width 16 of stage 2 is not a multiple of attention_head_dim 12"):
        FSAE(config(attention_head_dim=12))
    with pytest.raises(ValueError, match="choose widths"):
        FSAE(config(widths=(8, 24, 40), attention_head_dim=8))


def test_fingerprint_follows_the_weights() -> None:
    fsae = build(WITH_PIXEL_STAGE)
    before = fingerprint(fsae)
    assert before == fingerprint(build(WITH_PIXEL_STAGE)) and len(before) == 64
    fsae.decoder.conv_in.bias[0] += 1e-3
    assert fingerprint(fsae) != before


def test_property_34_size_of_the_papers_autoencoder() -> None:
    with torch.device("meta"):
        fsae = FSAE(FSAEConfig())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (fsae.encoder, fsae.decoder))
    assert (round(encoder / 1e6, 1), round(decoder / 1e6, 1)) == (494.7, 544.3)
    assert (fsae.spatial_factor, fsae.temporal_factor, fsae.latent_channels) == (64, 4, 128)
