"""A dataset of own latents is read like one of preprocessing, with the same tensors; what does not fit is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.data.dataset_json import AutoencoderRecord, ImageRecord, LatentSpace, TextRecord
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_writer import LatentShardWriter, OwnClip

ROOT = Path(__file__).parents[2]


def space(**changes) -> LatentSpace:
    autoencoder = {
        "path": "my-vae",
        "fingerprint": "f",
        "spatial_factor": 8,
        "temporal_factor": 4,
        "latent_channels": 3,
    }
    return LatentSpace(AutoencoderRecord(**autoencoder | changes), TextRecord("mine", 5, 6), ImageRecord("eyes", 7, 2))


def clip(k: int, **changes) -> OwnClip:
    generator = torch.Generator().manual_seed(k)
    shape = (3, 3, 4, 5) if k % 2 else (3, 1, 2, 2)
    values = {
        "latents": 5 + 2 * torch.randn(shape, generator=generator),
        "fps": 12,
        "caption": f"№{k}",
        "text": torch.randn(1 + k % 6, 5, generator=generator),
        "image": torch.randn(2, 7, generator=generator).half(),
        "source": f"{k}.mp4",
    }
    return OwnClip(**values | changes)


def test_the_dataset_that_is_read_holds_what_was_written(tmp_path):
    """Two processes write a part each, and one of them finishes."""
    for part, numbers in (("0", range(5)), ("1", range(5, 8))):
        assert LatentShardWriter(tmp_path, space(), samples_per_shard=2).write(map(clip, numbers), part) == len(numbers)
    null, negative = torch.ones(1, 5), torch.zeros(2, 5)
    LatentShardWriter(tmp_path, space()).finish(null, negative, "ugly")
    dataset = LatentDataset([str(tmp_path)])
    assert len(dataset) == 8 and [str(bucket) for bucket in dataset.buckets] == ["1x16x16", "9x32x40"]
    assert torch.equal(dataset.null_text, null) and torch.equal(dataset.negative_text, negative)
    for index, stream in enumerate(dataset.streams):
        for position in range(stream.num_samples):
            sample = dataset.read(index, position)
            wanted = clip(int(sample.record["source"].removesuffix(".mp4")))
            for name in ("latents", "text", "image"):
                assert torch.equal(getattr(sample, name), getattr(wanted, name).bfloat16())
            assert sample.record["caption"] == wanted.caption and sample.record["fps"] == 12
    values = torch.cat([clip(k).latents.bfloat16().double().flatten(1) for k in range(8)], dim=1)
    torch.testing.assert_close(torch.tensor(dataset.scale.mean), values.mean(1).float())
    with pytest.raises(ValueError, match="holds a dataset already"):
        LatentShardWriter(tmp_path, space())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"latents": torch.zeros(4, 1, 2, 2)},
            r"clip 0 \(0.mp4\): latents: .* \[4, 1, 2, 2\], .* \[3, 'any'",
        ),
        ({"latents": torch.full((3, 1, 2, 2), float("nan"))}, "latents: holds numbers that are not finite"),
        ({"latents": torch.zeros(3, 1, 2, 2, dtype=torch.int8)}, "latents: torch.int8"),
        ({"text": torch.zeros(7, 5)}, "text has 7 rows, the text encoder's max_length is 6"),
        ({"text": None}, r"text: torch.float32 \[0, 0\], the description asks for floats \['any', 5\]"),
        ({"image": torch.zeros(3, 7)}, r"image: torch.float32 \[3, 7\]"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        LatentShardWriter(tmp_path, space()).write([clip(0, **changes)])
    assert not list(tmp_path.rglob("*.*"))
    with pytest.raises(ValueError, match="has no clips yet"):
        LatentShardWriter(tmp_path, space()).finish(torch.zeros(1, 5))


def test_parts_and_descriptions_are_checked(tmp_path):
    with pytest.raises(ValueError, match="spatial_factor is 0"):
        LatentShardWriter(tmp_path, space(spatial_factor=0))
    with pytest.raises(ValueError, match="spell it with letters"):
        LatentShardWriter(tmp_path, space()).write([clip(0)], "../x")
    LatentShardWriter(tmp_path, space()).write([clip(0)])
    with pytest.raises(ValueError, match="is there already"):
        LatentShardWriter(tmp_path, space()).write([clip(1)])
    with pytest.raises(ValueError, match="another autoencoder"):
        LatentShardWriter(tmp_path, space(fingerprint="g")).finish(torch.zeros(1, 5))


def test_the_example_writes_a_folder_of_tensors(tmp_path, monkeypatch):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for k in range(3):
        tensors = {name: getattr(clip(k), name) for name in ("latents", "text")}
        safetensors.torch.save_file(tensors, inputs / f"{k}.safetensors")
        (inputs / f"{k}.txt").write_text(f"caption {k}\n")
    safetensors.torch.save_file({"text": torch.ones(1, 5)}, inputs / "null.safetensors")
    spec = importlib.util.spec_from_file_location("own_latents", ROOT / "examples/preprocess/own_latents.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    words = ["--input", inputs, "--output", tmp_path / "out", "--autoencoder-name", "my-vae", "--fps", "24"]
    monkeypatch.setattr(sys, "argv", ["own_latents.py", *map(str, words)])
    module.main()
    dataset = LatentDataset([str(tmp_path / "out")])
    assert sorted(record["caption"] for record in dataset.records()) == [f"caption {k}" for k in range(3)]
    assert json.loads((tmp_path / "out/dataset.json").read_text())["image_encoder"]["embed_dim"] == 0
