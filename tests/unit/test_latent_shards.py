"""Shards: ordinary tars, exact round trip, random access, damage found."""

import json
import tarfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.data.latent_shards import (
    LatentSample,
    LatentStatistics,
    SampleEntry,
    ShardError,
    find_manifests,
    hash_key,
    read_manifest,
    read_sample,
    sample_id,
    write_shard,
)


def make_sample(k: int) -> LatentSample:
    generator = torch.Generator().manual_seed(k)
    record = {"key": hash_key("sample", k), "latent_key": f"l{k}", "text_key": f"t{k}", "image_key": f"i{k}",
              "bucket": "9x32x32", "fps": 8.0, "caption": f"Ein Häschen №{k}"}  # fmt: skip
    return LatentSample(
        torch.randn(6, 3, 8, 8, generator=generator).bfloat16(),
        torch.randn(k + 1, 5, generator=generator).bfloat16(),
        torch.randn(2, 3, generator=generator).bfloat16(),
        record,
    )


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path, "000000-a", "f" * 64, map(make_sample, range(5)), [("bad.mp4", "truncated")])
    return tmp_path / "000000-a.tar"


def test_round_trip(shard):
    manifest = read_manifest(shard.with_suffix(".json"))
    assert manifest.skipped == (("bad.mp4", "truncated"),) and manifest.autoencoder == "f" * 64
    for k in (3, 0, 4):
        sample, expected = read_sample(shard, manifest.samples[k]), make_sample(k)
        assert dict(sample.record) == dict(expected.record)
        for name in ("latents", "text", "image"):
            got, want = getattr(sample, name), getattr(expected, name)
            assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_an_ordinary_webdataset_tar(shard):
    with tarfile.open(shard) as tar:
        names = tar.getnames()
        assert names == [f"{make_sample(k).key}.{end}" for k in range(5) for end in ("safetensors", "json")]
        tensors = safetensors.torch.load(tar.extractfile(names[2]).read())
        assert torch.equal(tensors["latents"], make_sample(1).latents)
        assert json.loads(tar.extractfile(names[3]).read())["caption"] == "Ein Häschen №1"


def test_equal_samples_give_equal_bytes(shard, tmp_path):
    write_shard(tmp_path / "again", "000000-a", "f" * 64, map(make_sample, range(5)), [("bad.mp4", "truncated")])
    for path in (shard, shard.with_suffix(".json")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_sample_is_named(shard):
    manifest = read_manifest(shard.with_suffix(".json"))
    data = bytearray(shard.read_bytes())
    data[manifest.samples[2].offset + manifest.samples[2].length - 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=rf"sample {make_sample(2).key} at byte \d+: checksum \w+, expected \w+"):
        read_sample(shard, manifest.samples[2])
    read_sample(shard, manifest.samples[3])


def test_a_truncated_shard_is_named_with_numbers(shard):
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ShardError, match=rf"000000-a.tar: corrupt shard: 1000 bytes, its manifest says {size}; "):
        read_manifest(shard.with_suffix(".json"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "samples": [{"key": "a"}], "statistics": {}}'])
def test_a_damaged_manifest_is_named(shard, text):
    shard.with_suffix(".json").write_text(text)
    with pytest.raises(ShardError, match="000000-a.json"):
        read_manifest(shard.with_suffix(".json"))


def test_a_failed_writer_leaves_nothing(tmp_path):
    def samples():
        yield make_sample(0)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(tmp_path / "shards", "000000-a", "f", samples())
    assert list((tmp_path / "shards").iterdir()) == [] and find_manifests(tmp_path) == []


def test_statistics():
    latents = [make_sample(k).latents for k in range(5)]
    sums = LatentStatistics()
    for sample in latents:
        sums += LatentStatistics.of(sample)
    mean, std = sums.mean_std()
    values = torch.stack(latents, 1).double().flatten(1)
    torch.testing.assert_close(torch.tensor(mean).double(), values.mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(std).double(), values.std(1, correction=0), atol=1e-6, rtol=1e-6)
    assert LatentStatistics.of(torch.ones(2, 1, 3, 3)).mean_std() == ([1.0, 1.0], [1.0, 1.0])


def test_keys():
    assert hash_key("a", "bc") != hash_key("ab", "c")
    assert 0 <= sample_id(hash_key("x")) < 2**63 and sample_id(hash_key("x")) != sample_id(hash_key("y"))


def stored(folder, payload: bytes, record: bytes, **changes):
    """A tar-like file with these two members and its entry, with a right checksum."""
    sample = make_sample(0)
    path = folder / "hostile.tar"
    path.write_bytes(payload + record)
    values = {name: sample.record[name] for name in ("key", "latent_key", "text_key", "image_key", "bucket", "fps")}
    values |= {"offset": 0, "length": len(payload), "json_offset": len(payload), "json_length": len(record)}
    return path, SampleEntry(**(values | {"crc32": zlib.crc32(record, zlib.crc32(payload))} | changes))


def tensors_of(**changes) -> bytes:
    sample = make_sample(0)
    tensors = {"latents": sample.latents, "text": sample.text, "image": sample.image} | changes
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})


RECORD = json.dumps(dict(make_sample(0).record)).encode()
HOSTILE = {
    "no safetensors": (b"hello", RECORD),
    "a header beyond the file": (b"\xff" * 8 + b"{}", RECORD),
    "no latents": (tensors_of(latents=None), RECORD),
    "no image": (tensors_of(image=None), RECORD),
    "an axis too few": (tensors_of(latents=torch.zeros(3, dtype=torch.bfloat16)), RECORD),
    "whole numbers": (tensors_of(latents=torch.zeros(6, 1, 2, 2, dtype=torch.int64)), RECORD),
    "not finite": (tensors_of(text=torch.full((1, 5), float("nan"), dtype=torch.bfloat16)), RECORD),
    "no JSON": (tensors_of(), b"{"),
    "not UTF-8": (tensors_of(), b'{"key": "\xff"}'),
    "deep JSON": (tensors_of(), b"[" * 100_000),
    "a list": (tensors_of(), b"[]"),
    "another key": (tensors_of(), RECORD.replace(make_sample(0).key.encode(), make_sample(1).key.encode())),
    "no caption": (tensors_of(), json.dumps({**make_sample(0).record, "caption": None}).encode()),
    "another bucket": (tensors_of(), json.dumps({**make_sample(0).record, "bucket": "1x8x8"}).encode()),
}


def test_the_members_that_the_hostile_ones_are_made_from_are_read(tmp_path):
    assert read_sample(*stored(tmp_path, tensors_of(), RECORD)).key == make_sample(0).key


@pytest.mark.parametrize("name", HOSTILE)
def test_members_with_right_checksums_are_not_trusted(tmp_path, name):
    path, entry = stored(tmp_path, *HOSTILE[name])
    with pytest.raises(ShardError, match=f"hostile.tar: sample {entry.key}") as error:
        read_sample(path, entry)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def changed(tar, **changes):
    path = tar.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": "../../etc/passwd.tar"}, "shard is '../../etc/passwd.tar'"),
        ({"size": -1}, "size is -1"),
        ({"size": "1"}, "size is '1'"),
        ({"samples": {}}, "samples is dict"),
        ({"statistics": None}, "statistics is None"),
        ({"version": 2}, "format version 2, this code reads 1"),
        ({"skipped": [["a"]]}, "skipped[0] is list of 1"),
    ],
)
def test_values_of_a_manifest_are_checked(shard, changes, words):
    with pytest.raises(ShardError, match="000000-a.json") as error:
        read_manifest(changed(shard, **changes))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", "zz"),
        ("key", 1),
        ("bucket", "9x9"),
        ("fps", -1),
        ("fps", 0),
        ("offset", -5),
        ("crc32", 2**40),
        ("length", 0.5),
    ],
)
def test_values_of_a_manifests_samples_are_checked(shard, name, value):
    samples = json.loads(shard.with_suffix(".json").read_text())["samples"]
    samples[1][name] = value
    with pytest.raises(ShardError, match="000000-a.json"):
        read_manifest(changed(shard, samples=samples))


def test_equal_samples_are_stored_once_and_counted(tmp_path, caplog):
    manifest = write_shard(tmp_path, "000000-a", "f", [make_sample(0), make_sample(1), make_sample(0)])
    assert (len(manifest.samples), manifest.duplicates) == (2, 1)
    assert "000000-a.tar: 1 clips are equal to others" in caplog.text
    with tarfile.open(tmp_path / "000000-a.tar") as tar:
        names = tar.getnames()
    assert len(set(names)) == len(names) == 4
    assert [Path(name).stem for name in names[::2]] == [Path(name).stem for name in names[1::2]]
    assert read_manifest(tmp_path / "000000-a.json") == manifest
