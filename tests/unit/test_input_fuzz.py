"""Mutated inputs: each one is read, or refused in one line that names the file. Never another exception, never a hang.

The default suite tries some; the slow test tries 500 of each kind of JSON and 300 images.
"""

import io
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from megatron_fsvideo.checkpoint.release import load_fsae, save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.conversion.source import open_source
from megatron_fsvideo.data.images import read_image
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.manifest import read_manifest_lines
from megatron_fsvideo.inference.requests import read_requests
from megatron_fsvideo.models.fsae import FSAE
from tests.latent_fixtures import write_latent_dataset

SECONDS = 10.0
ODD = [
    None, True, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, "", "x", "\0", "../x", "/", "a" * 5000,
    "9x32x32", "1e5", [], [1], [[]], {}, {"a": 1}, [None], "\u2028",
]  # fmt: skip
RAW = [b"", b"{", b"[", b"null", b"NaN", b"\xff\xfe{", b"\xef\xbb\xbf", b"[" * 50_000, b'{"a":' * 50_000, bytes(64)]


def mutated_value(value, chance: random.Random):
    """A JSON value with one part of it changed, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.15:
            return {key: part for key, part in value.items() if key != name}
        if kind < 0.25:
            return value | {chance.choice(["zz", "", "_class_name", "auto_map"]): chance.choice(ODD)}
        return value | {name: mutated_value(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        return [*value[:index], mutated_value(value[index], chance), *value[index + 1 :]]
    return chance.choice(ODD)


def mutated_text(value, chance: random.Random) -> bytes:
    """A JSON text with a changed value, changed bytes, or something else altogether."""
    kind = chance.random()
    if kind < 0.1:
        return chance.choice(RAW)
    text = json.dumps(value if kind < 0.3 else mutated_value(value, chance)).encode()
    return text if kind > 0.3 else mutated_bytes(text, chance)


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with up to eight of them changed, a stretch cut out, or the end missing."""
    changed = bytearray(data)
    kind = chance.random()
    if kind < 0.2:
        return data[: chance.randrange(len(data))]
    if kind < 0.3:
        start = chance.randrange(len(data))
        del changed[start : start + chance.randrange(1, 64)]
        return bytes(changed)
    for _ in range(chance.randrange(1, 9)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


class Tries:
    """Counts what was read and what was refused."""

    def __init__(self) -> None:
        self.read = self.refused = 0

    def run(self, path: Path, use) -> None:
        began = time.monotonic()
        try:
            use()
            self.read += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            assert path.name in str(error) or path.parent.name in str(error), str(error)
            self.refused += 1
        assert time.monotonic() - began < SECONDS


def fuzz_json(path: Path, values, use, count: int, seed: int) -> Tries:
    """Try mutations of a JSON file, or of a JSONL file where `values` is a list of lines; then restore the file."""
    chance, tries = random.Random(seed), Tries()
    whole = path.read_bytes() if path.exists() else None
    for _ in range(count):
        if isinstance(values, list):
            lines = [json.dumps(value).encode() for value in values]
            lines[chance.randrange(len(lines))] = mutated_text(chance.choice(values), chance)
            path.write_bytes(b"\n".join(lines))
        else:
            path.write_bytes(mutated_text(values, chance))
        tries.run(path, use)
    if whole is not None:
        path.write_bytes(whole)
    return tries


def use_dataset(folder: Path) -> None:
    dataset = LatentDataset([str(folder)], max_bad_fraction=1.0)
    dataset.read(0, 0)
    dataset.bucket_tokens((1, 1, 1))
    dataset.description()


def wan_folder(folder: Path) -> Path:
    """A diffusers folder whose config.json is read before its weights are compared."""
    folder.mkdir()
    values = {"_class_name": "WanTransformer3DModel", "num_layers": 1, "num_attention_heads": 2, "ffn_dim": 8}
    values |= {"attention_head_dim": 4, "patch_size": [1, 2, 2], "in_channels": 36, "out_channels": 16, "eps": 1e-6}
    values |= {"text_dim": 8, "freq_dim": 8}
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.torch.save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def fuzz_all_json(tmp_path: Path, count: int) -> dict[str, Tries]:
    manifest, requests = tmp_path / "clips.jsonl", tmp_path / "requests.jsonl"
    entries = [{"path": f"{k}.mp4", "caption": "a", "start": 0, "num_frames": 9, "split": "train"} for k in range(3)]
    asked = [{"image": "a.png", "prompt": "x", "out": f"{k}.mp4", "seed": k} for k in range(3)]
    dataset = write_latent_dataset(tmp_path / "latents", 4)
    shard = next((dataset / "shards").glob("*.json"))
    torch.manual_seed(0)
    save_fsae(tmp_path / "fsae", FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))
    config = tmp_path / "fsae" / "config.json"
    wan = wan_folder(tmp_path / "wan")
    return {
        "manifest": fuzz_json(manifest, entries, lambda: read_manifest_lines(manifest), count, 1),
        "requests": fuzz_json(requests, asked, lambda: read_requests(requests, 0), count, 2),
        "dataset.json": fuzz_json(
            dataset / "dataset.json", json.loads((dataset / "dataset.json").read_text()), lambda: use_dataset(dataset),
            count, 3,
        ),
        "shard manifest": fuzz_json(shard, json.loads(shard.read_text()), lambda: use_dataset(dataset), count, 4),
        "release config": fuzz_json(
            config, json.loads(config.read_text()), lambda: load_fsae(tmp_path / "fsae"), count, 5
        ),
        "wan config": fuzz_json(
            wan / "config.json", json.loads((wan / "config.json").read_text()), lambda: open_source(wan, None, False),
            count, 6,
        ),
    }  # fmt: skip


def images_of(seed: int) -> dict[str, bytes]:
    """One small image of each kind."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 4), np.uint8)
    picture, found = Image.fromarray(pixels), {}
    exif = Image.Exif()
    exif[274] = 6
    for name in ("png", "jpg", "webp", "gif", "tif", "bmp", "ppm"):
        buffer = io.BytesIO()
        mode = {"png": "RGBA", "webp": "RGBA", "gif": "P"}.get(name, "RGB")
        options = {"exif": exif} if name in ("png", "jpg", "webp", "tif") else {}
        picture.convert(mode).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name, name.upper()), **options)
        found[name] = buffer.getvalue()
    return found


def fuzz_images(tmp_path: Path, count: int) -> Tries:
    chance, tries, whole = random.Random(7), Tries(), images_of(0)
    for _ in range(count):
        name = chance.choice(sorted(whole))
        path = tmp_path / f"a.{name}"
        path.write_bytes(mutated_bytes(whole[name], chance))
        tries.run(path, lambda path=path: read_image(path))
    return tries


def test_some_mutations(tmp_path):
    found = fuzz_all_json(tmp_path, 40) | {"images": fuzz_images(tmp_path, 100)}
    # Mutations that no reader refuses, or that all refuse, would test nothing.
    for name, tries in found.items():
        assert tries.refused > 10 and (tries.read or name == "wan config"), (name, vars(tries))


@pytest.mark.slow
def test_many_mutations(tmp_path, capsys):
    found = fuzz_all_json(tmp_path, 500) | {"images": fuzz_images(tmp_path, 300)}
    with capsys.disabled():
        for name, tries in found.items():
            print(f"{name}: {tries.refused} refused, {tries.read} read")
