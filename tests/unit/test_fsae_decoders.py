"""The Standard and Lite decoders (paper section 2.2.3)."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_fsvideo.config import FSAE_PRESETS, FSAEConfig, FSAEJob, build_job
from megatron_fsvideo.models.fsae import FSAE, StreamCache
from megatron_fsvideo.models.fsae.context import DecodeContext, Window
from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, CenterConv3d, GroupCausalConv3d
from megatron_fsvideo.models.fsae.first_frame import FirstFrameAttention
from megatron_fsvideo.models.fsae.layers import PixelNorm, ResBlock
from tests.unit.fsae_fixtures import build, config, decode_chunks, difference, random_latents, random_video

KINDS = pytest.mark.parametrize("kind", ["causal", "standard", "lite"])


@KINDS
@pytest.mark.parametrize("k", range(5))
def test_property_01_shapes(kind: str, k: int) -> None:
    fsae = build(config(kind))
    latents = fsae.encode(random_video(4 * k + 1, batch=2))
    assert latents.shape == (2, 4, k + 1, 2, 3)
    features = fsae.first_frame_features(random_video(1, batch=2))
    assert fsae.decode(latents, features).shape == (2, 3, 4 * k + 1, 16, 24)
    with pytest.raises(ValueError, match=r"needs 4k\+1 frames"):
        fsae.encode(random_video(4 * k + 3))


@KINDS
@pytest.mark.parametrize("latent", [0, 1, 3])
def test_property_03_what_a_latent_reaches(kind: str, latent: int) -> None:
    fsae = build(config(kind))
    latents, features = random_latents(fsae.config, 4), fsae.first_frame_features(random_video(1))
    changed = latents.clone()
    changed[:, :, latent] += 0.5
    effect = (fsae.decode(changed, features) - fsae.decode(latents, features)).abs().amax(dim=(0, 1, 3, 4))
    first = max(0, 4 * latent - 3)
    assert effect[first:].min() > 1e-9, "its own frames and those after them"
    if first and kind == "standard":
        assert effect[:first].min() > 1e-9, "a Standard decoder sees the future"
    elif first:
        assert effect[:first].max() == 0


@pytest.mark.parametrize("kind", ["causal", "lite"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
def test_property_05_sliced_decode_is_exact(kind: str, chunks: tuple[int, ...]) -> None:
    fsae = build(config(kind))
    latents, features = random_latents(fsae.config, 4), fsae.first_frame_features(random_video(1))
    sliced = torch.cat(decode_chunks(fsae, latents.split(chunks, dim=2), features), dim=2)
    assert difference(sliced, fsae.decode(latents, features)) < 1e-12


def test_property_05_standard_refuses_slices() -> None:
    fsae = build(config("standard"))
    with pytest.raises(ValueError, match="cannot decode in chunks exactly.*decode_frames"):
        fsae.decode_chunk(random_latents(fsae.config, 1), StreamCache())


def test_property_06_interleaved_lite_streams() -> None:
    fsae = build(config("lite"))
    videos = [random_latents(fsae.config, 3), random_latents(fsae.config, 3).flip(2) * 0.7]
    features = [fsae.first_frame_features(random_video(1, seed=k)) for k in range(2)]
    caches, decoded = [StreamCache(), StreamCache()], [[], []]
    for i in range(3):
        for k in range(2):
            chunk = videos[k][:, :, i : i + 1].clone()
            decoded[k].append(fsae.decode_chunk(chunk, caches[k], features[k]))
            chunk.zero_()  # the caller may reuse its buffer
    for k in range(2):
        assert difference(torch.cat(decoded[k], dim=2), fsae.decode(videos[k], features[k])) < 1e-12


def test_convolutions_follow_their_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 5, 6, dtype=torch.float64)
    for group, end in ((1, lambda t: t), (2, lambda t: 2 * -(-t // 2)), (4, lambda t: 4 * -(-t // 4)), (None, None)):
        depthwise = group == 2
        if group is None:
            conv = CenterConv3d(4, 4).double()
        else:
            conv = GroupCausalConv3d(4, 4, group=group, depthwise=depthwise).double()
        torch.nn.init.normal_(conv.bias)
        for t in range(9):
            last = 8 if end is None else end(t)
            neighbours = torch.stack([x[:, :, max(0, t - 1)], x[:, :, t], x[:, :, min(t + 1, last)]], dim=2)
            expected = F.conv3d(neighbours, conv.weight, conv.bias, padding=(0, 1, 1), groups=4 if depthwise else 1)
            assert difference(conv(x)[:, :, t : t + 1].detach(), expected.detach()) < 1e-12, (group, t)


def test_property_11_center_and_group_differ_only_where_groups_end() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 5, 6, dtype=torch.float64)
    for group in (1, 2, 4):
        grouped, center = GroupCausalConv3d(4, 6, group=group).double(), CenterConv3d(4, 6).double()
        center.load_state_dict(grouped.state_dict())
        differs = [(grouped(x) - center(x))[:, :, t].abs().max() > 1e-9 for t in range(9)]
        # The last frame of the video has no next frame in either.
        assert differs == [t % group == 0 and t < 8 for t in range(9)], group


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_first_frame_attention_starts_as_nothing_and_is_skipped_without_features(kind: str) -> None:
    torch.manual_seed(0)
    fsae = FSAE(config(kind)).double().requires_grad_(False)
    latents, features = random_latents(fsae.config, 3), fsae.first_frame_features(random_video(1))
    assert len(fsae.decoder.first_frame) == 2 == len(features)
    assert torch.equal(fsae.decode(latents, features), fsae.decode(latents))
    fsae = build(config(kind))
    assert difference(fsae.decode(latents, features), fsae.decode(latents)) > 1e-3


def attention_reference(layer: FirstFrameAttention, x, feature, window: int):
    """Position by position: softmax over the positions of the same square, complex rotations."""
    b, c, t, h, w = x.shape
    d, pairs = layer.head_dim, layer.head_dim // 4
    q, feature = layer.query(layer.query_norm(x)), layer.feature_norm(feature)
    k, v = layer.key(feature), layer.value(feature)
    frequencies = 100.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)

    def rotated(vector, row, column):
        parts = vector.reshape(-1, 2, 2, pairs)
        turned = torch.complex(parts[:, :, 0], parts[:, :, 1])
        angles = torch.stack([row * frequencies, column * frequencies])
        return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    out = torch.zeros_like(q)
    for n, frame, row, column in ((n, f, y, z) for n in range(b) for f in range(t) for y in range(h) for z in range(w)):
        square = [
            (y, z)
            for y in range(h)
            for z in range(w)
            if (y // window, z // window) == (row // window, column // window)
        ]
        query = rotated(q[n, :, frame, row, column], row, column)
        keys = torch.stack([rotated(k[n, :, 0, y, z], y, z) for y, z in square], dim=1)
        values = torch.stack([v[n, :, 0, y, z].reshape(-1, d) for y, z in square], dim=1)
        weights = torch.softmax(torch.einsum("hd,hpd->hp", query, keys) / d**0.5, dim=1)
        out[n, :, frame, row, column] = torch.einsum("hp,hpd->hd", weights, values).flatten()
    return x + layer.out(out)


@pytest.mark.parametrize("window", [2, 3, 8], ids=["even", "ragged", "global"])
def test_first_frame_attention_is_windowed_softmax(window: int) -> None:
    torch.manual_seed(0)
    norms = (PixelNorm(16), PixelNorm(12))
    layer = FirstFrameAttention(16, 12, 8, window, norms).double().requires_grad_(False)
    torch.nn.init.normal_(layer.out.weight)
    x, feature = torch.randn(2, 16, 2, 4, 5).double(), torch.randn(2, 12, 1, 4, 5).double()
    whole = layer(x, feature, Window(0, 0, 4, 5))
    assert difference(whole, attention_reference(layer, x, feature, window)) < 1e-12
    # A crop with the whole frame's features gives the crop of the result; a slice of frames the slice.
    crop = layer(x[:, :, 1:, 1:4, 2:], feature, Window(1, 2, 4, 5))
    assert difference(crop, whole[:, :, 1:, 1:4, 2:]) < 1e-12
    with pytest.raises(ValueError, match="features are 4x5 where the video is 4x6"):
        layer(x, feature, Window(0, 0, 4, 6))


def test_property_16_noise() -> None:
    torch.manual_seed(0)
    block = ResBlock(8, PixelNorm(8), noise_weight=0.05).double().requires_grad_(False)
    x = torch.randn(2, 8, 3, 16, 16).double()
    context, window = DecodeContext(), Window(0, 0, 64, 48)
    noise = context.noise_map("site", Window(16, 16, 64, 48), x)
    added = block(x, None, noise) - block(x)
    assert difference(added, (0.05 * noise).expand_as(added)) < 1e-9, "one map for all channels, frames and samples"

    frame = context.noise_map("site", window, torch.empty(64, 48).double())
    assert abs(float(frame.std()) - 1) < 0.03 and abs(float(frame.mean())) < 0.03
    assert torch.equal(noise, frame[..., 16:32, 16:32]), "a tile's noise is the whole frame's"
    assert torch.equal(frame, DecodeContext().noise_map("site", window, frame))
    assert not torch.equal(frame, DecodeContext(noise_seed=1).noise_map("site", window, frame))
    assert not torch.equal(frame, context.noise_map("other site", window, frame))


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_property_16_noise_in_the_decoder(kind: str) -> None:
    fsae, silent = build(config(kind)), build(config(kind, noise_weight=0.0))
    latents = random_latents(fsae.config, 2)
    assert torch.equal(fsae.decode(latents), fsae.decode(latents, noise_seed=0))
    assert difference(fsae.decode(latents, noise_seed=1), fsae.decode(latents)) > 1e-3
    assert torch.equal(silent.decode(latents, noise_seed=1), silent.decode(latents))
    assert fsae.decoder.noisy_stages == [1, 0] and not build(config("causal")).decoder.noisy_stages


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_gradients_reach_every_weight_of_the_decoder(kind: str) -> None:
    fsae = build(config(kind)).requires_grad_(True)
    fsae.encoder.requires_grad_(False)
    features = fsae.first_frame_features(random_video(1))
    (fsae.decode(random_latents(fsae.config, 3), features) - random_video(9)).abs().mean().backward()
    silent = [name for name, p in fsae.decoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent, silent
    assert all(p.grad is None for p in fsae.encoder.parameters())


def test_without_a_pixel_stage() -> None:
    for kind in ("standard", "lite"):
        fsae = build(
            config(
                kind,
                widths=(8, 24, 16, 16),
                decoder_widths=(8, 24, 16, 16),
                encoder_depths=(0, 1, 1, 1),
                decoder_depths=(0, 1, 1, 1),
            )
        )
        latents, features = random_latents(fsae.config, 3), fsae.first_frame_features(random_video(1))
        whole = fsae.decode(latents, features)
        assert whole.shape == (1, 3, 9, 16, 24)
        if kind == "lite":
            sliced = torch.cat(decode_chunks(fsae, latents.split(1, dim=2), features), dim=2)
            assert difference(sliced, whole) < 1e-12


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "changes, sizes, teraflops",
    [
        ({"decoder": "standard", "phase": 5}, (494.7, 544.3, 27.3), (8.1, 15.0)),
        ({"decoder": "standard", "phase": 5, "upsampling": "sub-pixel"}, (494.7, 862.8, 27.3), (8.1, 15.0)),
        (
            {"decoder": "standard", "phase": 5, "widths": (128, 256, 512, 512, 1024, 1024, 1024)},
            (301.2, 350.7, 14.7),
            (8.1, 14.9),
        ),
        # The specification's 6.0 convolves three taps where a latent's only frame needs two.
        (FSAE_PRESETS["fsae_lite"], (494.7, 514.8, 27.3), (8.1, 4.7)),
    ],
    ids=["standard", "sub-pixel", "narrow", "lite"],
)
def test_property_34_sizes_and_work(changes: dict, sizes: tuple, teraflops: tuple) -> None:
    with torch.device("meta"):
        fsae = FSAE(build_job(FSAEJob, changes).model)
        video = torch.empty(1, 3, 17, 256, 256)
    first_frame = count(fsae.decoder.first_frame)
    numbers = (count(fsae.encoder), count(fsae.decoder) - first_frame, first_frame)
    assert tuple(round(number / 1e6, 1) for number in numbers) == sizes
    counts = []
    with torch.no_grad():
        for run in (lambda: fsae.encode(video), lambda: fsae.decode(torch.empty(1, 128, 5, 4, 4, device="meta"))):
            with FlopCounterMode(display=False) as counter:
                run()
            counts.append(round(counter.get_total_flops() / 1e12, 1))
    assert tuple(counts) == teraflops


@pytest.mark.parametrize(
    "clip, teraflops", [((121, 1024, 1024), (885, 1619, 530)), ((121, 704, 1280), (760, 1391, 456))], ids=str
)
def test_property_34_work_of_long_clips(clip: tuple[int, int, int], teraflops: tuple[int, int, int]) -> None:
    frames, height, width = clip
    video = torch.empty(1, 3, *clip, device="meta")
    latents = torch.empty(1, 128, (frames - 1) // 4 + 1, height // 64, width // 64, device="meta")
    with torch.device("meta"):
        standard, lite = (FSAE(build_job(FSAEJob, FSAE_PRESETS[f"fsae_{kind}"]).model) for kind in ("standard", "lite"))
    counts = []
    for run in (lambda: standard.encode(video), lambda: standard.decode(latents), lambda: lite.decode(latents)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counts.append(round(counter.get_total_flops() / 1e12))
    # The specification has 631 and 542 for Lite, three taps where a latent's only frame needs two.
    assert tuple(counts) == teraflops


@pytest.mark.parametrize("name", [name for name in FSAE_PRESETS if name.endswith(("_debug", "_small"))])
def test_small_presets_are_whole(name: str) -> None:
    job = build_job(FSAEJob, FSAE_PRESETS[name])
    with torch.device("meta"):
        fsae = FSAE(job.model)
        side, frames = fsae.spatial_factor, 5
        video = torch.empty(1, 3, frames, side, side)
    assert fsae.decode(fsae.encode(video), fsae.first_frame_features(video)).shape == video.shape


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one width for each of the 4 stages"):
        config("lite", decoder_widths=(4, 8))
    with pytest.raises(ValueError, match="first_frame_head_dim 12 must divide"):
        FSAE(config("standard", first_frame_head_dim=12))
    with pytest.raises(ValueError, match="decoder's last width 18"):
        FSAE(config("standard", decoder_widths=(8, 8, 16, 18)))
    assert FSAEConfig(decoder_widths=()).decoder_channels == FSAEConfig().widths
    assert isinstance(FSAE(config()).decoder.conv_in, CausalConv3d)
