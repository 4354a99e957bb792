"""Shards: ordinary tars, exact round trip, random access, damage found."""

import json
import tarfile

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.data.latent_shards import (
    LatentSample,
    LatentStatistics,
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
    with pytest.raises(ShardError, match="000000-a.json: "):
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
