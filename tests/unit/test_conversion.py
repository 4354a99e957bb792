"""Converting checkpoints: the safetensors writer, recognised formats, and what is refused."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights, write_distributed_weights
from megatron_fsvideo.checkpoint.dit_release import DIT_FORMAT, DiTRecord
from megatron_fsvideo.checkpoint.safe_pickle import UnsafeCheckpointError
from megatron_fsvideo.checkpoint.safetensors_shards import (
    SafetensorsFolder,
    TensorInfo,
    parse_size,
    split_into_shards,
    write_shards,
)
from megatron_fsvideo.config import DiTConfig, DiTJob
from megatron_fsvideo.conversion.convert import check_output
from megatron_fsvideo.conversion.source import Source, open_source, recognise
from megatron_fsvideo.conversion.wan_config import (
    config_from_diffusers,
    config_from_wan,
    config_to_diffusers,
    config_to_wan,
)
from tools.convert_checkpoint import ConvertFlags, start_job

WAN_14B = DiTConfig(latent_channels=16, patch_size=(1, 2, 2), layer_memory=False)


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(30, 7, generator=generator),
        "half": torch.randn(5, 3, 2, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "strided": torch.randn(8, 6, generator=generator).t(),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }


def infos_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int = 10**9) -> Path:
    folder.mkdir()
    write_shards(folder, "model", infos_of(tensors), tensors.__getitem__, max_shard_size, {"format": "pt"})
    return folder


def test_written_shards_are_what_the_library_reads(tmp_path):
    tensors = random_tensors()
    single = write(tmp_path / "single", tensors)
    assert [path.name for path in single.iterdir()] == ["model.safetensors"]
    several = write(tmp_path / "several", tensors, max_shard_size=900)
    assert sorted(path.name for path in several.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    for folder in (single, several):
        read, ours = {}, SafetensorsFolder(folder)
        for path in folder.glob("*.safetensors"):
            read |= safetensors.torch.load_file(path)
            assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert ours.infos == infos_of(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor) and torch.equal(ours.read(name), tensor), name


def test_shards_are_cut_by_bytes():
    infos = {name: TensorInfo((size,), torch.bfloat16) for name, size in zip("abcd", (10, 20, 70, 5), strict=True)}
    assert split_into_shards(infos, 60) == [["a", "b"], ["c"], ["d"]]
    assert split_into_shards(infos, 1) == [["a"], ["b"], ["c"], ["d"]]
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5MB") == 1_500_000
    for wrong in ("5", "5 GB", "0GB", "-1GB", "5GiB", "many"):
        with pytest.raises(ValueError, match="5GB or 500MB"):
            parse_size(wrong)


def test_damaged_safetensors_are_refused(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path / "ok", tensors, max_shard_size=900)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    cut = broken("cut")
    path = cut / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="00002-of-00002.safetensors is damaged or missing"):
        SafetensorsFolder(cut)
    path.unlink()
    with pytest.raises(ValueError, match="00002-of-00002.safetensors is damaged or missing"):
        SafetensorsFolder(cut)

    index = broken("index") / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["half"]
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="disagree on 1 tensors, first half: index none"):
        SafetensorsFolder(index.parent)
    index.write_text(json.dumps({"weight_map": {"half": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"refers to '../elsewhere.safetensors'"):
        SafetensorsFolder(index.parent)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        SafetensorsFolder(index.parent)
    index.unlink()
    with pytest.raises(ValueError, match="needs one .safetensors file, or several with an index"):
        SafetensorsFolder(index.parent)

    whole = tmp_path / "integers"
    whole.mkdir()
    safetensors.torch.save_file({"count": torch.arange(3)}, whole / "model.safetensors")
    with pytest.raises(ValueError, match="count is I64; weights are read as F64, F32, F16, BF16"):
        SafetensorsFolder(whole)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', None),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 8]}}', r"a \[2\] is said to be in bytes 4 to 8"),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', r"a \[-2\] is said to be in bytes 0 to 8"),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}', "its tensors need"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "its tensors need"),
        ('{"a": {"dtype": "F32", "shape": [2]}}', "damaged or missing: KeyError"),
        ('{"a": 3}', "damaged or missing: TypeError"),
        ("[1]", "damaged or missing"),
        ("{", "damaged or missing: JSONDecodeError"),
    ],
)
def test_headers_that_lie_are_refused(header, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    if message is None:
        assert SafetensorsFolder(tmp_path).read("a").tolist() == [0.0, 0.0]
        path.write_bytes((1000).to_bytes(8, "little") + header.encode() + bytes(8))
        message = "a header of 1000 bytes in a file of"
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(tmp_path)


def test_formats_are_recognised_or_refused(tmp_path):
    cases = {"WanTransformer3DModel": "diffusers", "WanModel": "wan"}
    for name, kind in cases.items():
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        assert recognise(tmp_path) == kind
    (tmp_path / "config.json").write_text(json.dumps({"format": DIT_FORMAT}))
    assert recognise(tmp_path) == "release"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="unknown: config.json says _class_name 'FluxTransformer2DModel'"):
        recognise(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        recognise(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="unknown: it has neither latest_checkpointed_iteration.txt nor config.json"):
        recognise(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert recognise(tmp_path) == "distributed"
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert recognise(pipeline) == "diffusers"
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(tmp_path / "nothing", None, True)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    weights = {name: torch.empty(shape, device="meta") for name, shape in {"head.a": (2,), "head.b": (3, 4)}.items()}
    record = DiTRecord(DiTJob(), None, 0, {})
    stored = SafetensorsFolder(write(tmp_path / "r", {"head.b": torch.zeros(4, 3), "head.c": torch.zeros(1)}))
    source = Source("folder", "release", record, stored, None)
    with pytest.raises(ValueError) as error:
        source.check(weights)
    for part in (
        "3 tensors differ from the 2 expected",
        "head.a [2] is missing",
        "head.b is [4, 3], expected [3, 4]",
        "head.c [1] is unexpected",
    ):
        assert part in str(error.value)


def test_configs_round_trip_and_variants_are_refused():
    values = config_to_diffusers(WAN_14B)
    assert values["in_channels"] == 36 and values["added_kv_proj_dim"] == 5120
    assert config_from_diffusers(values, "x") == WAN_14B
    shapes = {
        "patch_embedding.weight": (5120, 36, 1, 2, 2),
        "text_embedding.0.weight": (5120, 4096),
        "img_emb.proj.1.weight": (1280, 1280),
    }
    # As the released Wan2.1-I2V-14B says it.
    published = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 5120,
        "eps": 1e-06,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 36,
        "model_type": "i2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }
    assert config_from_wan(published, shapes, "x") == WAN_14B
    assert config_to_wan(WAN_14B) == {key: published[key] for key in config_to_wan(WAN_14B)}

    for change, message in (
        ({"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514"),
        ({"in_channels": 16}, "16 input channels for 16 latent channels"),
        ({"added_kv_proj_dim": None}, "image_dim is 1280 and added_kv_proj_dim None"),
        ({"num_layers": None}, "x lacks num_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            config_from_diffusers(values | change, "x")
    with pytest.raises(ValueError, match="patch_embedding.weight has the shape None"):
        config_from_wan(published, {}, "x")
    for make in (config_to_diffusers, config_to_wan):
        with pytest.raises(ValueError, match="layer_memory True; the routers have no place there"):
            make(DiTConfig())
        with pytest.raises(ValueError, match="rope_scale_hw 2.0, text_embed_dim 0"):
            make(DiTConfig(layer_memory=False, rope_scale_hw=2.0, text_embed_dim=0))


def test_distributed_weights_round_trip_tensor_by_tensor(tmp_path):
    tensors, reads = random_tensors(), []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return tensors[name]

    write_distributed_weights(tmp_path, infos_of(tensors), read, common={})
    assert sorted(reads) == sorted(tensors)
    stored = DistributedWeights(tmp_path, "")
    assert stored.infos == infos_of(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor), name
    assert list(DistributedWeights(tmp_path, "ma").infos) == ["trix"]


def test_a_distributed_checkpoint_cannot_run_code(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    tensors = random_tensors()
    for file_name in (".metadata", "common.pt"):
        folder = tmp_path / file_name.strip(".")
        folder.mkdir()
        write_distributed_weights(folder, infos_of(tensors), tensors.__getitem__, common={})
        if file_name == ".metadata":
            (folder / file_name).write_bytes(pickle.dumps(Evil()))
        else:
            torch.save(Evil(), folder / file_name)
        with pytest.raises(UnsafeCheckpointError, match="is refused"):
            DistributedWeights(folder, "")

    folder = tmp_path / "tensors"
    folder.mkdir()
    write_distributed_weights(folder, infos_of(tensors), tensors.__getitem__, common={})
    stored = DistributedWeights(folder, "")
    ((index, place),) = stored._parts["matrix"]
    torch.save(Evil(), folder / "evil.distcp")
    length = (folder / "evil.distcp").stat().st_size
    stored._parts["matrix"] = [
        (index, dataclasses.replace(place, relative_path="evil.distcp", offset=0, length=length))
    ]
    with pytest.raises(UnsafeCheckpointError, match="matrix in .*evil.distcp is refused: not a plain tensor"):
        stored.read("matrix")
    assert not marker.exists()


def test_output_is_checked_first(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        check_output(tmp_path, 1)
    with pytest.raises(ValueError, match="needs 1000000000.0 GB, its disk has"):
        check_output(tmp_path / "new", 10**18)
    with pytest.raises(ValueError, match="--to-preset dit_15b is unknown: take one of .*dit_14b"):
        start_job(ConvertFlags("a", "b", "release", to_preset="dit_15b"))
