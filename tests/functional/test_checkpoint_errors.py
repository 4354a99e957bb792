"""A checkpoint that does not belong to the run is refused with one clear line, and none can run code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_fsvideo.checkpoint.checksums import checksums_of, read_checksums, write_checksums
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE, LATEST_FILE, iteration_folder, latest_iteration
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.latent_fixtures import write_latent_dataset

SAVED = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations with its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    run_to_end(debug_arguments(data, folder, "--train-iters", str(SAVED)), folder / "log")
    return folder


class _Payload:
    """Unpickling this opens a file for writing: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def forge_checksums(source: Path) -> None:
    """What somebody would do who means to deceive."""
    write_checksums(source, checksums_of(source, read_checksums(source)))


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_hostile_checkpoint_runs_no_code(data: Path, saved: Path, tmp_path: Path, file: str) -> None:
    folder, canary = _copy(saved, tmp_path / "run"), tmp_path / "code_ran"
    path = iteration_folder(folder, SAVED) / file
    if file == "common.pt":
        torch.save({"iteration": _Payload(canary)}, path)
    else:
        path.write_bytes(pickle.dumps(_Payload(canary)))
    forge_checksums(iteration_folder(folder, SAVED))
    _expect_one_line(debug_arguments(data, folder), tmp_path / "log", file, "refused")
    assert not canary.exists()
    # The payload does work where nobody looks.
    pickle.loads(pickle.dumps(_Payload(canary))).close()
    assert canary.exists()


def test_a_hostile_entry_among_the_tensors_runs_no_code(data: Path, saved: Path, tmp_path: Path) -> None:
    """torch's reader unpickles byte entries with `weights_only=False`: they must not be reached."""
    folder, canary = _copy(saved, tmp_path / "run"), tmp_path / "code_ran"
    source = iteration_folder(folder, SAVED)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith("dit.ema."))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    for path in source.glob("*.distcp"):
        torch.save(_Payload(canary), path)
    forge_checksums(source)
    _expect_one_line(debug_arguments(data, folder), tmp_path / "log", ".metadata", "refused")
    assert not canary.exists()


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "common.pt", "job.json"])
@pytest.mark.parametrize("kept", [100, None], ids=["truncated", "missing"])
def test_a_damaged_checkpoint_is_one_line(data: Path, saved: Path, tmp_path: Path, pattern: str, kept: int) -> None:
    folder = _copy(saved, tmp_path / "run")
    (path,) = iteration_folder(folder, SAVED).glob(pattern)
    content = path.read_bytes()
    path.unlink()
    if kept:
        path.write_bytes(content[:kept])
    _expect_one_line(debug_arguments(data, folder), tmp_path / "log", iteration_folder(folder, SAVED).name)


def test_another_architecture_is_refused_by_name(data: Path, saved: Path, tmp_path: Path) -> None:
    argv = debug_arguments(data, saved, "--num-layers", "3", "--ffn-hidden-size", "64")
    _expect_one_line(argv, tmp_path / "log", "num_layers", "2", "3", "ffn_hidden_size", "96", "64")


def test_latents_of_another_autoencoder_are_refused(saved: Path, tmp_path: Path) -> None:
    other = write_latent_dataset(tmp_path / "other", fingerprint="b" * 64)
    _expect_one_line(debug_arguments(other, saved), tmp_path / "log", "autoencoder", "aaaaaaaa", "bbbbbb")


@pytest.mark.parametrize(
    ("dataset", "flags", "said"),
    [
        ({"seed": 1}, "", "the samples of 5x32x32 in folder 1 of data_path (24) are others, or have other contents"),
        ({}, "--seed 7", "seed is 7, it was 1234"),
        ({}, "--global-batch-size 4", "the batch of 5x32x32 is 4, it was 2"),
        ({"num_samples": 25}, "", "24 samples of 5x32x32"),
    ],
    ids=["replaced", "seed", "batch", "count"],
)
def test_a_position_in_other_data_is_refused(saved: Path, tmp_path: Path, dataset: dict, flags: str, said: str) -> None:
    other = write_latent_dataset(tmp_path / "other", **dataset)
    argv = debug_arguments(other, saved, *flags.split(), "--train-iters", "3")
    _expect_one_line(argv, tmp_path / "log", said, "--new-stage", "--finetune")


def test_a_damaged_pointer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LATEST_FILE).write_text("7\n")
    with pytest.raises(ValueError, match="iter_0000007 does not exist"):
        latest_iteration(tmp_path)
    (tmp_path / LATEST_FILE).write_text("seven\n")
    with pytest.raises(ValueError, match="'seven'"):
        latest_iteration(tmp_path)


def test_a_checkpoint_says_what_made_it(saved: Path) -> None:
    record = json.loads((iteration_folder(saved, SAVED) / JOB_FILE).read_text())
    assert record["job"]["model"]["num_layers"] == 2
    assert record["data"]["autoencoder"]["fingerprint"] == "a" * 64
    assert record["order"]["settings"] == {"seed": 1234, "the batch of 5x32x32": 2}
    assert (record["iteration"], record["consumed_samples"]) == (SAVED, 2 * SAVED)


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
def test_an_output_that_cannot_be_written_is_noticed_before_training(data: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").touch()
    argv = debug_arguments(data, tmp_path / "run", "--train-iters", "100000")
    argv[argv.index(flag) + 1] = str(tmp_path / "file" / "inside")
    argv[argv.index("--load") + 1] = argv[argv.index("--save") + 1]
    _expect_one_line(argv, tmp_path / "log", str(tmp_path / "file" / "inside"))


def _expect_one_line(argv: list[str], log: Path, *parts: str) -> None:
    """The program ends with an error code and one line that contains all parts."""
    code, text = Run(argv, log).wait()
    assert code != 0
    assert "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line


def test_a_checkpoint_is_not_overwritten_by_a_run_that_does_not_continue_it(
    data: Path, saved: Path, tmp_path: Path
) -> None:
    folder = _copy(saved, tmp_path / "run")
    argv = debug_arguments(data, folder)
    place = argv.index("--load")
    _expect_one_line([*argv[:place], *argv[place + 2 :]], tmp_path / "log", str(folder), "overwrite", "--load")
