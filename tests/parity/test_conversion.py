"""Conversion is numeric: bit-exact round trips between all formats, and the source's outputs from converted models."""

import contextlib
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

import tools.convert_checkpoint as tool
from megatron_fsvideo.checkpoint.checksums import check_files
from megatron_fsvideo.checkpoint.dit_release import open_dit_release
from megatron_fsvideo.checkpoint.save_folder import iteration_folder, read_record
from megatron_fsvideo.config import DIT_PRESETS, DiTConfig, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.inference.loading import load_dit, load_model
from megatron_fsvideo.models.dit import unpatchify
from megatron_fsvideo.parallel import groups
from tests.functional.runs import debug_arguments, losses, run_to_end
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers
from tests.parity.test_diffusers_wan import configuration, inputs, theirs
from tests.wan_fixtures import wan_config, wan_shapes

PRESET = build_job(DiTJob, DIT_PRESETS["dit_debug"]).model
# Wan2.1-I2V in the sizes of the debug preset: Wan's patch and other latents, no layer memory.
DEBUG_WAN = DiTConfig(**{**PRESET.__dict__, "latent_channels": 6, "patch_size": (1, 2, 2), "layer_memory": False})
TINY = configuration((1, 2, 2))
PIPELINE = ("--pipeline-model-parallel-size", "2")
State = dict[str, torch.Tensor]


def convert(source: Path, output: Path, output_format: str, **flags: object) -> str:
    """Run the tool in a process of its own; what it printed."""
    values = tool.ConvertFlags(input=str(source), output=str(output), output_format=output_format, **flags)

    def work() -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            tool.convert(values)
        return printed.getvalue()

    return run_workers(work, 1)[0]


def write_diffusers(folder: Path, config: DiTConfig) -> WanTransformer3DModel:
    """A transformer as diffusers saves it, in several shards."""
    model = theirs(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def read_folder(folder: Path) -> State:
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= safetensors.torch.load_file(path)
    return state


def write_wan(folder: Path, config: DiTConfig, dtype: torch.dtype = torch.float32) -> State:
    """A checkpoint with the original's names, two shards and config.json."""
    generator = torch.Generator().manual_seed(5)
    state = {
        name: (("norm" in name) + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in wan_shapes(config).items()
    }
    folder.mkdir()
    names, base = sorted(state), "diffusion_pytorch_model"
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"{base}-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in chosen}, folder / file_name)
        weight_map |= dict.fromkeys(chosen, file_name)
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(wan_config(config)))
    return state


def assert_equal_states(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def run_converted(folder: Path, tp_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The output of a release or distributed checkpoint at this tensor-parallel size."""

    def work() -> torch.Tensor:
        parallel = DiTParallelConfig(tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1)
        pgs = groups.initialize(parallel)
        loaded = load_model(folder, parallel, pgs, use_ema=True)
        assert loaded.network.bf16 == (dtype == torch.bfloat16)
        config, data = loaded.network.model, inputs(loaded.network.model)
        with torch.no_grad():
            tokens = loaded.model(data["hidden_states"], data["timestep"], data["text"], data["image"])
        return unpatchify(tokens, (3, 4 // config.patch_size[1], 6 // config.patch_size[2]), config.patch_size)

    return run_workers(work, tp_size)[0]


def run_diffusers(model: WanTransformer3DModel, config: DiTConfig) -> torch.Tensor:
    data = inputs(config)
    with torch.no_grad():
        return model(
            hidden_states=data["hidden_states"],
            timestep=data["timestep"],
            encoder_hidden_states=data["text"],
            encoder_hidden_states_image=data["image"],
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def diffusers_chain(tmp_path_factory) -> tuple[Path, WanTransformer3DModel]:
    """diffusers -> wan -> release -> distributed -> diffusers, and back from the release."""
    folder = tmp_path_factory.mktemp("diffusers")
    model = write_diffusers(folder / "source", TINY)
    steps = ["source", "wan", "release", "distributed", "diffusers"]
    for before, after in itertools.pairwise(steps):
        convert(folder / before, folder / after, after, max_shard_size="100KB")
    return folder, model


def test_diffusers_through_every_format_and_back_is_bit_exact(diffusers_chain):
    folder, model = diffusers_chain
    assert_equal_states(read_folder(folder / "diffusers"), model.state_dict())
    values = WanTransformer3DModel.load_config(folder / "diffusers")
    again = WanTransformer3DModel.from_config(values)
    again.load_state_dict(read_folder(folder / "diffusers"))
    expected = json.loads((folder / "source/config.json").read_text())
    assert {key: again.config[key] for key in expected if not key.startswith("_")} == {
        key: value for key, value in expected.items() if not key.startswith("_")
    }


def test_a_converted_checkpoint_is_checked_like_any_other(diffusers_chain, tmp_path):
    shutil.copytree(diffusers_chain[0] / "distributed" / "iter_0000000", tmp_path / "damaged")
    check_files(tmp_path / "damaged")
    tensors = bytearray((tmp_path / "damaged/__0_0.distcp").read_bytes())
    tensors[len(tensors) // 2] ^= 1
    (tmp_path / "damaged/__0_0.distcp").write_bytes(tensors)
    with pytest.raises(ValueError, match=r"__0_0.distcp is damaged: its checksum is"):
        check_files(tmp_path / "damaged")


def test_the_wan_names_are_those_that_diffusers_knows(diffusers_chain):
    folder, model = diffusers_chain
    state = read_folder(folder / "wan")
    assert {name: tuple(value.shape) for name, value in state.items()} == wan_shapes(TINY)
    assert_equal_states(convert_wan_transformer_to_diffusers(state), model.state_dict())


@pytest.mark.parametrize("kind", ["release", "distributed"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_converted_from_diffusers_gives_its_outputs(kind, tp_size, diffusers_chain):
    folder, model = diffusers_chain
    expected = run_diffusers(model, TINY)
    assert (run_converted(folder / kind, tp_size) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def wan_chain(tmp_path_factory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("wan")
    state = write_wan(folder / "source", TINY)
    for before, after in (("source", "release"), ("release", "wan"), ("source", "distributed")):
        convert(folder / before, folder / after, after)
    convert(folder / "distributed", folder / "wan_again", "wan")
    return folder, state


def test_wan_through_ours_and_back_is_bit_exact(wan_chain):
    folder, state = wan_chain
    for back in ("wan", "wan_again"):
        assert_equal_states(read_folder(folder / back), state)
        written = json.loads((folder / back / "config.json").read_text())
        assert written == json.loads((folder / "source/config.json").read_text())


@pytest.mark.parametrize("kind", ["release", "distributed"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_converted_from_wan_gives_the_outputs_of_diffusers_own_conversion(kind, tp_size, wan_chain):
    folder, state = wan_chain
    model = theirs(TINY)
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(state)))
    expected = run_diffusers(model, TINY)
    assert (run_converted(folder / kind, tp_size) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_number_formats(tmp_path):
    state = write_wan(tmp_path / "wan", TINY, torch.bfloat16)
    convert(tmp_path / "wan", tmp_path / "kept", "release")
    record, stored = open_dit_release(tmp_path / "kept")
    assert record.network.bf16 and {info.dtype for info in stored.infos.values()} == {torch.bfloat16}
    convert(tmp_path / "kept", tmp_path / "wan_again", "wan")
    assert_equal_states(read_folder(tmp_path / "wan_again"), state)

    convert(tmp_path / "kept", tmp_path / "bf16", "release", dtype="bf16")
    _, stored = open_dit_release(tmp_path / "bf16")
    wide = {name for name, info in stored.infos.items() if info.dtype == torch.float32}
    assert all(name.startswith(("condition_embedder.time", "head.")) or "scale_shift" in name for name in wide)
    assert len(wide) == 6 + 3 + TINY.num_layers
    convert(tmp_path / "kept", tmp_path / "fp32", "distributed", dtype="fp32")
    assert not read_record(tmp_path / "fp32", 0)["networks"]["dit"]["bf16"]


@pytest.fixture(scope="module")
def debug_wan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("debug_wan") / "source"
    write_wan(folder, DEBUG_WAN)
    return folder


def test_a_wan_checkpoint_becomes_a_start(debug_wan, tmp_path):
    printed = convert(debug_wan, tmp_path / "start", "release", to_preset="dit_debug")
    convert(debug_wan, tmp_path / "plain", "release")
    kept, fresh = read_folder(tmp_path / "plain"), []
    record, stored = open_dit_release(tmp_path / "start")
    assert record.network.model == DiTConfig(**{**PRESET.__dict__, "layer_memory_init": 0.99})
    for name in stored.infos:
        if name.startswith(("patch_embedding.", "head.proj_out.")) or ".layer_memory." in name:
            fresh.append(name)
        else:
            assert torch.equal(stored.read(name), kept[name]), name
    assert sorted(line.split()[1] for line in printed.splitlines() if line.startswith("fresh: ")) == sorted(fresh)
    assert sorted(record.origin["fresh"]) == sorted(fresh) and record.data is None
    assert len(fresh) == 2 + 2 + 2 * (PRESET.num_layers - 1)
    router = "block.layers.1.layer_memory.router"
    assert not stored.read(f"{router}.weight").any()
    assert stored.read(f"{router}.bias").softmax(0).tolist() == pytest.approx([0.01, 0.99])
    assert stored.read("patch_embedding.weight").std() > 0.05
    with pytest.raises(AssertionError, match="num_layers 2, preset 40.*hidden_size 48, preset 5120"):
        convert(debug_wan, tmp_path / "wrong", "release", to_preset="dit_14b")


def test_an_identity_start_on_the_same_latents_changes_no_bit_in_bf16(tmp_path):
    same_latents = DiTConfig(**{**PRESET.__dict__, "layer_memory": False})
    write_wan(tmp_path / "wan", same_latents)
    convert(tmp_path / "wan", tmp_path / "plain", "release", dtype="bf16")
    flags = {"to_preset": "dit_debug", "dtype": "bf16"}
    printed = convert(tmp_path / "plain", tmp_path / "start", "distributed", layer_memory_init=1.0, **flags)
    assert printed.count("fresh: ") == printed.count(".router.") == 2
    plain, start = (run_converted(tmp_path / name, 1, torch.bfloat16) for name in ("plain", "start"))
    assert torch.equal(plain, start) and plain.std() > 0.01
    convert(tmp_path / "plain", tmp_path / "leaning", "release", **flags)
    assert not torch.equal(plain, run_converted(tmp_path / "leaning", 1, torch.bfloat16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A dataset, and a run of two iterations at tensor-parallel size 2."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_latent_dataset(folder / "data")
    flags = ["--tensor-model-parallel-size", "2", "--train-iters", "2"]
    run_to_end(debug_arguments(data, folder / "run", *flags), folder / "log", 2)
    return data, folder / "run"


def finetune(data: Path, source: Path, save: Path, *flags: str, world_size: int = 1) -> dict[int, float]:
    argv = debug_arguments(data, save, "--finetune", "--train-iters", "3", *flags)
    argv[argv.index("--load") + 1] = str(source)
    run_to_end(argv, save.with_suffix(".log"), world_size)
    return losses(save / "logs")


def test_training_continues_from_a_converted_checkpoint_as_from_the_original(trained, tmp_path):
    data, run = trained
    convert(run, tmp_path / "release", "release", use_ema=False)
    convert(tmp_path / "release", tmp_path / "converted", "distributed")
    expected = finetune(data, run, tmp_path / "one")
    assert finetune(data, tmp_path / "converted", tmp_path / "two") == expected
    stages = finetune(data, tmp_path / "converted", tmp_path / "three", *PIPELINE, world_size=2)
    assert stages == pytest.approx(expected, rel=1e-5)


def test_a_start_from_wan_trains(debug_wan, trained, tmp_path):
    convert(debug_wan, tmp_path / "start", "distributed", to_preset="dit_debug")
    values = finetune(trained[0], tmp_path / "start", tmp_path / "run")
    assert list(values) == [1, 2, 3]
    record = read_record(tmp_path / "run", 3)
    assert record["data"]["autoencoder"]["fingerprint"] == "a" * 64


@pytest.mark.parametrize(("use_ema", "tp_size"), [(True, 2), (False, 1)])
def test_generation_loads_a_release_as_the_checkpoint_it_was(use_ema, tp_size, trained, tmp_path):
    _, run = trained
    convert(run, tmp_path / "release", "release", use_ema=use_ema)

    def weights(folder: Path) -> State:
        def work() -> State:
            parallel = DiTParallelConfig(tensor_model_parallel_size=tp_size)
            dit = load_dit(folder, parallel, groups.initialize(parallel), use_ema)
            assert dit.iteration == 2 and dit.data["fps"] == 8.0
            return dict(dit.model.named_parameters())

        return run_workers(work, tp_size)[-1]

    assert_equal_states(weights(tmp_path / "release"), weights(run))


def test_a_converted_model_without_data_is_refused_where_data_is_needed(debug_wan, tmp_path):
    convert(debug_wan, tmp_path / "start", "distributed", to_preset="dit_debug")
    assert iteration_folder(tmp_path / "start", 0).is_dir()

    def work() -> None:
        load_dit(tmp_path / "start", DiTParallelConfig(), groups.initialize(DiTParallelConfig()))

    with pytest.raises(AssertionError, match="knows no autoencoder: train it on latents first"):
        run_workers(work, 1)


def test_layer_memory_has_no_place_in_other_formats(trained, tmp_path):
    for kind in ("diffusers", "wan"):
        with pytest.raises(AssertionError, match=f"the format {kind} cannot hold a model with layer_memory True"):
            convert(trained[1], tmp_path / kind, kind)
    assert list(tmp_path.iterdir()) == []
