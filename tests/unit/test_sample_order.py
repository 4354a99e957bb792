"""A checkpoint's record of its data: what changed is named, and what is the same is accepted wherever it lies."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import DATASET_FILE, SHARD_FOLDER
from megatron_fsvideo.data.sample_order import check_order, list_record, order_changes, order_record
from tests.latent_fixtures import write_latent_dataset


def record(lines: str = "a b c", method: str = "m", **settings: object) -> dict:
    return order_record(method, settings, [list_record("the letters", lines.split())])


def test_every_change_is_named():
    saved = json.loads(json.dumps(record(seed=1, size=4)))
    assert order_changes(saved, record(seed=1, size=4)) == []
    assert order_changes(saved, record(seed=2, size=4)) == ["seed is 2, it was 1"]
    assert order_changes(saved, record(seed=1)) == ["size is None, it was 4"]
    assert order_changes(saved, record("a c b", seed=1, size=4)) == ["the letters (3) are the same in another order"]
    assert order_changes(saved, record("a b d", seed=1, size=4)) == [
        "the letters (3) are others, or have other contents"
    ]
    assert order_changes(saved, record("a b", "n", seed=1, size=4)) == [
        "the order is made by n, it was by m",
        "the letters are 2, they were 3",
    ]
    other = order_record("m", {"seed": 1, "size": 4}, [list_record("the words", ["a"])])
    assert order_changes(saved, other) == ["the data is the words, it was the letters"]
    with pytest.raises(ValueError, match=r"checkpoint run/x cannot .*: seed is 3, .*; size is 5, .* or start anew$"):
        check_order(saved, record(seed=3, size=5), "run/x", "start anew")


def test_lines_do_not_run_into_each_other():
    assert list_record("", ["ab", "c"])["ordered"] != list_record("", ["a", "bc"])["ordered"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"), 12, buckets=("5x32x32", "1x32x32"))


def changed(data: Path, target: Path, change) -> list[dict]:
    """The lists of a copy of the dataset whose manifest's samples were changed."""
    shutil.copytree(data, target)
    manifest = target / SHARD_FOLDER / "0000.json"
    values = json.loads(manifest.read_text())
    change(values["samples"])
    manifest.write_text(json.dumps(values))
    return LatentDataset([str(target)]).list_records


def changes(before: list[dict], after: list[dict]) -> list[str]:
    return order_changes(order_record("", {}, before), order_record("", {}, after))


def test_datasets_are_told_apart_without_reading_their_samples(data, tmp_path):
    before = LatentDataset([str(data)]).list_records
    assert [(entry["name"], entry["count"]) for entry in before] == [
        ("the samples of 1x32x32 in folder 1 of data_path", 6),
        ("the samples of 5x32x32 in folder 1 of data_path", 6),
    ]
    assert changes(before, changed(data, tmp_path / "moved", lambda samples: None)) == []
    reordered = changed(data, tmp_path / "reordered", lambda samples: samples.reverse())
    assert [line.partition(" (6) ")[2] for line in changes(before, reordered)] == ["are the same in another order"] * 2

    def replace(samples: list[dict]) -> None:
        samples[0]["crc32"] ^= 1  # a 5x32x32

    (line,) = changes(before, changed(data, tmp_path / "replaced", replace))
    assert line == "the samples of 5x32x32 in folder 1 of data_path (6) are others, or have other contents"


def test_how_samples_are_cut_into_shards_does_not_matter(data, tmp_path):
    target = tmp_path / "shards"
    shutil.copytree(data, target)
    first = target / SHARD_FOLDER / "0000"
    values = json.loads(first.with_suffix(".json").read_text())
    shutil.copy(first.with_suffix(".tar"), first.with_name("0001.tar"))
    for name, samples in (("0000", values["samples"][:5]), ("0001", values["samples"][5:])):
        text = json.dumps(values | {"shard": f"{name}.tar", "samples": samples})
        first.with_name(f"{name}.json").write_text(text)
    description = json.loads((target / DATASET_FILE).read_text())
    (target / DATASET_FILE).write_text(json.dumps(description | {"shards": ["0000.tar", "0001.tar"]}))
    assert changes(LatentDataset([str(data)]).list_records, LatentDataset([str(target)]).list_records) == []
