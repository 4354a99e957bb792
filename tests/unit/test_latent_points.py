"""Latents as points: from files, from datasets, from videos; which are chosen and what is refused."""

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.preprocessing import preprocess
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.evaluation.clips import read_clip
from megatron_fsvideo.evaluation.latent_points import encode_clips, read_points
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.parallel.team import Team
from tests.unit.data_fixtures import make_videos, tiny_encoders, tiny_options
from tests.unit.fsae_fixtures import build, config


def test_files_hold_a_point_per_row(tmp_path):
    values = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "points.npy", values.double().numpy())
    safetensors.torch.save_file({"z": values}, tmp_path / "one.safetensors")
    safetensors.torch.save_file({"latents": values, "ids": torch.arange(20)}, tmp_path / "named.safetensors")
    for name in ("points.npy", "one.safetensors", "named.safetensors"):
        points = read_points(str(tmp_path / name), None, 100)
        assert points.dtype == torch.float32 and torch.allclose(points, values.flatten(1))
    some = read_points(str(tmp_path / "points.npy"), None, 3)
    assert torch.equal(some, values.flatten(1)[[0, 10, 19]]) or torch.equal(some, values.flatten(1)[[0, 9, 19]])


def test_files_that_are_no_points(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    safetensors.torch.save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "whole.npy", np.zeros((3, 2), dtype=np.int64))
    (tmp_path / "x.pt").write_bytes(b"1")
    for name, message in (
        ("objects.npy", "no readable points"),
        ("two.safetensors", "holds 2 tensors, none called 'latents'"),
        ("whole.npy", "floating-point"),
        ("x.pt", "not a .npy or .safetensors file"),
        ("none.npy", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_points(str(tmp_path / name), None, 9)
    with pytest.raises(ValueError, match="--bucket 9x32x32 is for latent datasets"):
        read_points(str(tmp_path / "whole.npy"), "9x32x32", 9)


def test_dataset_gives_its_latents(tmp_path):
    folder = tmp_path / "latents"
    preprocess(folder, make_videos(tmp_path, 6), tiny_encoders(), tiny_options())
    dataset = LatentDataset([str(folder)])
    bucket = str(dataset.streams[0].bucket)
    expected = torch.stack([dataset.read(0, k).latents.flatten().float() for k in range(6)])
    assert torch.equal(read_points(str(folder), None, 100), expected)
    assert torch.equal(read_points(str(folder), bucket, 2), expected[[0, 5]])
    with pytest.raises(ValueError, match=f"has clips of {bucket}: choose one with --bucket, not 5x8x8"):
        read_points(str(folder), "5x8x8", 2)


def test_clips_are_encoded_one_by_one(tmp_path):
    make_videos(tmp_path, 3)
    fsae = build(config("causal")).float()
    data = VideoDataConfig(num_frames=5, resolution=16, short_side=24)
    clips = [Shot(str(tmp_path / f"video{k}.mp4"), k, 5) for k in range(3)] + [Shot(str(tmp_path / "gone.mp4"), 0, 5)]
    points, skipped = encode_clips(FSAECodec(fsae), clips, data, Team())
    assert list(skipped) == ["gone.mp4:0-5"]
    for k, point in enumerate(points):
        assert torch.equal(point, fsae.encode(read_clip(clips[k], data)).flatten())
