"""Latent datasets: blending, agreement of folders, damaged samples, batches."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from data_fixtures import CornerImage, make_videos, tiny_encoders, tiny_options

from megatron_fsvideo.data import latent_dataset
from megatron_fsvideo.data.batch_loader import BatchLoader
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import LatentDataset, SampleFilter, parse_data_path, read_sample_list
from megatron_fsvideo.data.latent_shards import ShardError, sample_id
from megatron_fsvideo.data.preprocessing import preprocess
from megatron_fsvideo.data.sampler import BucketSampler, SampleRef
from megatron_fsvideo.data.stored_batch import read_batch
from megatron_fsvideo.models.codecs import LatentScale
from tests.latent_fixtures import write_latent_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    preprocess(root / "a", make_videos(root / "videos", 8), tiny_encoders(image=CornerImage()), tiny_options())
    return root / "a"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the dataset to damage."""
    (tmp_path / "copy" / "shards").mkdir(parents=True)
    for path in folder.rglob("*"):
        if path.is_file():
            (tmp_path / "copy" / path.relative_to(folder)).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def damage(folder, dataset, position):
    path, entry = dataset._samples[0][position]
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.length - 1] ^= 0xFF
    path.write_bytes(data)
    return entry.key


def test_description(folder):
    dataset = LatentDataset([str(folder)])
    description = dataset.description()
    assert len(dataset) == 8 and dataset.buckets == [Bucket(9, 32, 32)]
    assert description["autoencoder"] == {
        "path": "tiny", "fingerprint": "0" * 64, "spatial_factor": 4, "temporal_factor": 4, "latent_channels": 6,
        "encoder_fingerprint": "0" * 64, "weights_fingerprint": "8" * 64,
    }  # fmt: skip
    assert description["text_encoder"]["name"] == "letters" and description["image_encoder"]["embed_dim"] == 3
    assert len(description["latent_mean"]) == 6 and description["buckets"] == ["9x32x32"] and description["fps"] == 8
    assert dataset.null_text.shape == (0, 5) and dataset.bucket_tokens((1, 2, 2)) == {Bucket(9, 32, 32): 3 * 4 * 4}


def test_a_batch(folder):
    dataset = LatentDataset([str(folder)])
    stored = read_batch(dataset, [SampleRef(0, 2, 0), SampleRef(0, 5, 3)])
    assert stored.latents.dtype == stored.text.dtype == torch.bfloat16 and stored.text.shape == (12, 5)
    batch = stored.to("cpu")
    samples = [dataset.read(0, 2), dataset.read(0, 5)]
    assert batch.latents.shape == (2, 6, 3, 8, 8) and batch.text.shape == (2, 12, 5) and batch.image.shape == (2, 2, 3)
    assert batch.sample_ids.tolist() == [sample_id(sample.key) for sample in samples] and batch.epochs.tolist() == [
        0,
        3,
    ]
    assert stored.text_lengths.tolist() == [6, 6] and batch.text[:, 6:].abs().max() == 0
    assert torch.equal(batch.text[0, :6], samples[0].text.float())
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (dataset.scale.mean, dataset.scale.std))
    torch.testing.assert_close(batch.latents[1] * std + mean, samples[1].latents.float(), atol=1e-5, rtol=1e-5)


def test_the_whole_dataset_is_normalised(folder):
    dataset = LatentDataset([str(folder)])
    latents = read_batch(dataset, [SampleRef(0, k, 0) for k in range(8)]).to("cpu").latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(6), atol=1e-3, rtol=0)


def test_validation_uses_the_training_data_s_normalisation(folder):
    other = LatentScale([0.5] * 6, [2.0] * 6)
    assert LatentDataset([str(folder)], scale=other).description()["latent_std"] == [2.0] * 6


def test_data_path():
    assert parse_data_path(["a", "b"]) == (None, [*map(type(parse_data_path(["a"])[1][0]), ["a", "b"])])
    weights, folders = parse_data_path(["3", "a", "1", "b"])
    assert [float(weight) for weight in weights] == [0.75, 0.25] and [str(path) for path in folders] == ["a", "b"]
    for wrong in (["0.7", "a", "b"], ["a", "0.7"], ["0.5"]):
        with pytest.raises(ValueError, match="weight folder weight folder"):
            parse_data_path(wrong)
    with pytest.raises(ValueError, match="must be positive"):
        parse_data_path(["0", "a", "1", "b"])
    with pytest.raises(ValueError, match="names no latent dataset"):
        parse_data_path([])


def test_one_corrupt_sample_is_skipped_counted_and_named(copy, caplog):
    dataset = LatentDataset([str(copy)])
    key = damage(copy, dataset, 3)
    assert dataset.read(0, 3).key == dataset.read(0, 4).key
    assert list(dataset.bad_samples) == [f"{dataset._samples[0][3][0]}:{key}"]
    assert key in caplog.text and "1 of 8" in caplog.text
    # It is named once, and the replacement is the same every time.
    caplog.clear()
    assert dataset.read(0, 3).key == dataset.read(0, 4).key and caplog.text == ""


def test_more_corrupt_samples_than_allowed_stop_the_run(copy):
    dataset = LatentDataset([str(copy)], max_bad_fraction=0.2)
    for k in (1, 3, 4):
        damage(copy, dataset, k)
    assert dataset.read(0, 3).key == dataset.read(0, 5).key
    with pytest.raises(ShardError, match="3 of 8 samples are unreadable, more than max_bad_fraction 0.2"):
        dataset.read(0, 1)


def test_a_truncated_shard_is_refused(copy):
    tar = sorted((copy / "shards").glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:777])
    with pytest.raises(ShardError, match=r"corrupt shard: 777 bytes, its manifest says \d+"):
        LatentDataset([str(copy)])


def test_shards_made_by_two_autoencoders_are_refused(copy, folder, tmp_path):
    entries = make_videos(tmp_path / "videos", 4)
    preprocess(tmp_path / "b", entries, tiny_encoders(1, CornerImage()), tiny_options())
    with pytest.raises(ShardError, match="was made by autoencoder 000000000000, .* by 111111111111: latents of two"):
        LatentDataset([str(folder), str(tmp_path / "b")])
    # Also when one was copied into the other's folder.
    foreign = next((tmp_path / "b" / "shards").glob("*.json"))
    first = sorted((copy / "shards").glob("*.json"))[0]
    first.write_text(foreign.read_text())
    first.with_name(foreign.with_suffix(".tar").name).write_bytes(foreign.with_suffix(".tar").read_bytes())
    with pytest.raises(ShardError, match="was made by autoencoder 111111111111, .* says 000000000000"):
        LatentDataset([str(copy)])


def test_folders_with_different_encoders_are_refused(folder, tmp_path):
    preprocess(tmp_path / "b", make_videos(tmp_path / "videos", 4), tiny_encoders(), tiny_options())
    with pytest.raises(ShardError, match="image_encoder corner, .* has none"):
        LatentDataset([str(folder), str(tmp_path / "b")])


def test_an_unfinished_folder_is_refused(copy, tmp_path):
    (copy / "dataset.json").unlink()
    with pytest.raises(ShardError, match="dataset.json is missing: .* has not finished"):
        LatentDataset([str(copy)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_reads_the_sampler_s_batches_from_any_point(folder, num_workers):
    dataset = LatentDataset([str(folder)])
    sampler = BucketSampler(dataset.streams, {Bucket(9, 32, 32): 4}, seed=1)
    loader = BatchLoader(
        dataset,
        sampler,
        dp_rank=1,
        dp_size=2,
        micro_batch_sizes={Bucket(9, 32, 32): 1},
        consumed_samples=8,
        num_workers=num_workers,
    )
    for step in range(5):
        plan, micro_batches = next(loader)
        assert plan == next(sampler.batches(8 + 4 * step))
        keys = [dataset.read(ref.stream_index, ref.position).key for ref in plan.samples]
        assert [batch.sample_ids.item() for batch in micro_batches] == [sample_id(keys[1]), sample_id(keys[3])]
    loader.close()


MIXED = ("1x32x32", "5x32x32", "5x32x64", "5x64x64")


def test_frames_and_resolution_choose_buckets(tmp_path):
    folder = str(write_latent_dataset(tmp_path, 20, buckets=MIXED))
    for frames, resolution, expected in (
        ((), None, MIXED),
        ((1,), None, MIXED[:1]),
        ((5,), 32, MIXED[1:2]),
        ((5,), 64, MIXED[3:]),
        ((), 32, MIXED[:2]),
    ):
        dataset = LatentDataset([folder], sample_filter=SampleFilter(frames, resolution))
        assert [str(bucket) for bucket in dataset.buckets] == sorted(expected)
        assert len(dataset) == 5 * len(expected)
    with pytest.raises(ShardError, match=r"bucket_frames 5 and bucket_resolution 128 leave none .* 1x32x32 \(5 sa"):
        LatentDataset([folder], sample_filter=SampleFilter((5,), 128))


def test_a_resolution_takes_a_quarter_more_or_less_area():
    chosen = SampleFilter(resolution=256)
    areas = {"1x256x256": 1, "1x256x320": 1, "1x192x256": 1, "1x192x320": 1, "1x320x320": 0, "1x192x192": 0}
    for bucket, expected in areas.items():
        assert chosen.takes_bucket(Bucket.parse(bucket)) == expected, bucket


def test_a_sample_list_keeps_those_samples_and_the_normalisation(tmp_path):
    folder = str(write_latent_dataset(tmp_path / "data", 12, buckets=MIXED[:3], latent_std=2.0))
    whole = LatentDataset([folder])
    records = list(whole.records())
    assert len(records) == 12 and {record["bucket"] for record in records} == set(MIXED[:3])
    wanted = [record for record in records if record["caption"] in ("sample 1", "sample 4", "sample 5")]
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\n\n" + "".join(f"{record['key']} {record['caption']}\n" for record in wanted))
    dataset = LatentDataset([folder], sample_filter=SampleFilter(keys=read_sample_list(listed)))
    assert [record["key"] for record in dataset.records()] == [record["key"] for record in wanted]
    assert dataset.scale == whole.scale
    assert [stream.num_samples for stream in dataset.streams] == [2, 1]
    listed.write_text("0123 nothing of this dataset\n")
    with pytest.raises(ShardError, match="none of its 12 samples is among the 1 keys of sample_list"):
        LatentDataset([folder], sample_filter=SampleFilter(keys=read_sample_list(listed)))
    listed.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no sample"):
        read_sample_list(listed)


def test_a_folder_with_a_number_for_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    assert parse_data_path(["2024", "lat"]) == (None, [Path("2024"), Path("lat")])
    assert parse_data_path(["2025", "lat"]) == ([Fraction(1)], [Path("lat")])
    assert parse_data_path(["1", "2024", "3", "lat"]) == ([Fraction(1, 4), Fraction(3, 4)], [Path("2024"), Path("lat")])
    with pytest.raises(ValueError, match="2024 is a folder here"):
        parse_data_path(["1", "lat", "2024", "other"])


def test_a_number_that_would_fill_the_memory_is_a_folder():
    assert parse_data_path(["1e999999999"]) == (None, [Path("1e999999999")])


DAMAGE = {
    "fps": ("8", "fps is '8'"),
    "latent_std": ([0.0], "latent_std[0] is 0.0"),
    "latent_mean": ([0.0], "latent_mean has 1 numbers for"),
    "shards": (["../a.tar"], "shards[0] is '../a.tar'"),
    "autoencoder": ({"fingerprint": "a"}, "autoencoder is dict of 1: object missing required field"),
    "text_encoder": (None, "text_encoder is None"),
    "image_encoder": ({"name": "none"}, "image_encoder lacks the field embed_dim, num_tokens"),
    "version": (7, "format version 7"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_values_of_dataset_json_are_checked(copy, name):
    value, words = DAMAGE[name]
    path = copy / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ShardError, match="dataset.json") as error:
        LatentDataset([str(copy)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_sample_of_another_shape_is_skipped_and_named(copy, monkeypatch, caplog):
    dataset = LatentDataset([str(copy)], max_bad_fraction=0.5)
    whole = dataset.read(0, 0)

    def read(path, entry, honest=latent_dataset.read_sample):
        sample = honest(path, entry)
        return replace(sample, latents=sample.latents[:, :, :1]) if entry.key == whole.key else sample

    monkeypatch.setattr(latent_dataset, "read_sample", read)
    assert dataset.read(0, 0).key != whole.key
    assert f"sample {whole.key}: latents is" in caplog.text and len(dataset.bad_samples) == 1
