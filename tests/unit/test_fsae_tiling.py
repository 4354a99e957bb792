"""Slices and tiles."""

import pytest
import torch

from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.tiling import (
    Tiling,
    axis_tiles,
    decode_frames,
    encode_frames,
    frame_span,
    pad_to_grid,
)
from tests.unit.fsae_fixtures import build, config, difference, random_latents, random_video


def constant_decoder(fsae: FSAE, value: float) -> FSAE:
    fsae.decoder.head.weight.zero_()
    fsae.decoder.head.bias.fill_(value)
    return fsae


@pytest.mark.parametrize("chunks", [(1, 4, 4, 4), (13,), (2, 3, 8), (9, 4)])
@pytest.mark.parametrize("frames", [1, 2, 16])
def test_property_04_encoding_in_any_chunks(chunks: tuple[int, ...], frames: int) -> None:
    fsae, video = build(config()), random_video(13)
    streamed = torch.cat(list(encode_frames(fsae, video.split(chunks, dim=2), Tiling(frames, 0))), dim=2)
    assert difference(streamed, fsae.encode(video)) < 1e-12


@pytest.mark.parametrize("num_frames, latents", [(1, 1), (2, 2), (5, 2), (6, 3), (8, 3)])
def test_the_last_frame_fills_up_a_latent(num_frames: int, latents: int) -> None:
    fsae, video = build(config()), random_video(num_frames)
    streamed = torch.cat(list(encode_frames(fsae, [video], Tiling(1, 0))), dim=2)
    padded = torch.cat([video, *[video[:, :, -1:]] * (4 * latents - 3 - num_frames)], dim=2)
    assert difference(streamed, fsae.encode(padded)) < 1e-12
    assert not list(encode_frames(fsae, []))


@pytest.mark.parametrize("kind", ["causal", "lite"])
def test_property_05_decoding_in_slices(kind: str) -> None:
    fsae = build(config(kind))
    latents, features = random_latents(fsae.config, 7), fsae.first_frame_features(random_video(1))
    seen = []
    sliced = decode_frames(
        fsae, latents.split(5, dim=2), features, tiling=Tiling(2, 0), progress=lambda *done: seen.append(done)
    )
    assert difference(torch.cat(list(sliced), dim=2), fsae.decode(latents, features)) < 1e-12
    assert seen == [(1, None), (2, None), (3, None), (4, None)]


@pytest.mark.parametrize(
    "length, size, overlap", [(31, 16, 4), (7, 4, 2), (9, 4, 1), (5, 5, 2), (3, None, 0), (8, 4, 0)]
)
@pytest.mark.parametrize("span", [frame_span, lambda start, stop: (8 * start, 8 * stop)], ids=["time", "space"])
def test_property_19_weights_sum_to_one(length: int, size: int | None, overlap: int, span) -> None:
    tiles = axis_tiles(length, size, overlap, span)
    total = torch.zeros(span(0, length)[1])
    for tile in tiles:
        first, last = span(tile.start, tile.stop)
        assert tile.weights.min() > 0
        total[first:last] += tile.weights
    assert torch.allclose(total, torch.ones_like(total))
    for before, after in zip(tiles[:-1], tiles[1:], strict=True):
        assert before.stop - after.start >= overlap and before.start < after.start
    assert tiles[0].start == 0 and tiles[-1].stop == length and (size or length) >= tiles[0].stop


def test_property_19_a_constant_is_exact_and_one_tile_is_no_tile() -> None:
    fsae = constant_decoder(build(config("standard")), 0.7)
    latents = random_latents(fsae.config, 7, 5, 6)
    tiling = Tiling(frames=4, overlap_frames=2, rows=3, columns=4, overlap=1)
    seen = []
    tiled = decode_frames(fsae, [latents], tiling=tiling, progress=lambda *done: seen.append(done))
    assert (torch.cat(list(tiled), dim=2) - 0.7).abs().max() < 1e-12
    assert seen[-1][0] == seen[-1][1] == 3 * 2 * 2

    fsae = build(config("standard"))
    features = fsae.first_frame_features(random_video(1, 40, 48))
    whole = fsae.decode(latents, features)
    tiled = torch.cat(list(decode_frames(fsae, latents.split(2, dim=2), features)), dim=2)
    assert difference(tiled, whole) < 1e-12


@pytest.mark.parametrize("kind", ["causal", "standard", "lite"])
def test_property_20_counts_and_places_of_tiles(kind: str) -> None:
    """Tiles are where they belong: far from seams, and under little weight of others, they equal the whole."""
    fsae = build(config(kind))
    latents, features = random_latents(fsae.config, 9, 4, 6), fsae.first_frame_features(random_video(1, 32, 48))
    tiling = Tiling(frames=6, overlap_frames=3, rows=4, columns=4, overlap=2)
    parts = list(decode_frames(fsae, [latents], features, tiling=tiling))
    whole, tiled = fsae.decode(latents, features), torch.cat(parts, dim=2)
    assert tiled.shape == whole.shape
    # A Standard tile's first frames are finished where the next begins; others are slices.
    assert [part.shape[2] for part in parts] == ([9, 24] if kind == "standard" else [21, 12])
    assert difference(tiled, whole) < 0.9 * difference(tiled.roll(1, dims=2), whole), "no frame is out of place"
    error = (tiled - whole).square().mean() / (whole - whole.mean()).square().mean()
    assert error < 0.2, error


def test_encoding_in_spatial_tiles() -> None:
    fsae, video = build(config()), random_video(5, 32, 48)
    one = torch.cat(list(encode_frames(fsae, [video], Tiling(rows=4, columns=6))), dim=2)
    assert difference(one, fsae.encode(video)) < 1e-12
    tiled = torch.cat(list(encode_frames(fsae, [video], Tiling(rows=4, columns=4, overlap=2))), dim=2)
    assert tiled.shape == one.shape and 1e-6 < difference(tiled, one)


def test_pad_to_grid() -> None:
    video = random_video(2, 5, 7)
    padded = pad_to_grid(video, 4)
    assert padded.shape == (1, 3, 2, 8, 8)
    assert torch.equal(padded[..., :5, :7], video)
    assert torch.equal(padded[..., 7, :7], video[..., 4, :]) and torch.equal(padded[..., 7], padded[..., 6])
    assert pad_to_grid(padded, 4) is padded


def test_wrong_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 3 rows cannot overlap by 2"):
        Tiling(rows=3)
    with pytest.raises(ValueError, match="tiles of 6 frames cannot overlap by 4"):
        Tiling(frames=6)
