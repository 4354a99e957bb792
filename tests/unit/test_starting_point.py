"""Where a run begins or continues, decided from its flags and from what lies in the folders; no model is built."""

import json
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.checksums import checksums_of, write_checksums
from megatron_fsvideo.checkpoint.save_folder import (
    JOB_FILE,
    LATEST_FILE,
    iteration_folder,
    latest_iteration,
    name_latest,
    name_unnamed_checkpoint,
    remove_old_checkpoints,
    whole_iterations,
)
from megatron_fsvideo.checkpoint.starting_point import StartingPoint, find_starting_point
from megatron_fsvideo.config import CheckpointConfig


def write_checkpoint(folder: Path, iteration: int, whole: bool = True) -> Path:
    target = iteration_folder(folder, iteration)
    target.mkdir(parents=True)
    for name in ("weights", JOB_FILE):
        (target / name).write_text(json.dumps(iteration))
    if whole:
        write_checksums(target, checksums_of(target, ["weights", JOB_FILE]))
    return target


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An earlier run's folder."""
    write_checkpoint(tmp_path / "run", 4)
    name_latest(tmp_path / "run", 4)
    return tmp_path / "run"


def start(new_stage: bool = False, **flags: object) -> StartingPoint:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    return find_starting_point(CheckpointConfig(**values), new_stage)


def test_a_run_begins_anew(tmp_path):
    assert start() == start(save=tmp_path / "new") == StartingPoint()
    assert start(save=tmp_path / "new", load=tmp_path / "new") == StartingPoint()
    (tmp_path / "new").mkdir()
    assert start(save=tmp_path / "new", load=tmp_path / "new") == StartingPoint()


def test_a_run_continues(run, tmp_path):
    assert start(load=run) == StartingPoint(run)
    assert start(save=run, load=run) == StartingPoint(run, is_own=True)
    # Begun from another run, stopped and started again by the same command: its own folder wins.
    for flags in ({}, {"finetune": True}, {"new_stage": True}):
        purpose = "finetune" if "finetune" in flags else "stage" if flags else "resume"
        assert start(save=tmp_path / "b", load=run, **flags) == StartingPoint(run, purpose)
    write_checkpoint(tmp_path / "b", 2)
    name_latest(tmp_path / "b", 2)
    for flags in ({}, {"finetune": True}, {"new_stage": True}):
        assert start(save=tmp_path / "b", load=run, **flags) == StartingPoint(tmp_path / "b", is_own=True)


def test_paths_are_compared_resolved(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    for spelling in ("run", "./run/", "x/../run", "link", f"{run}/."):
        assert start(save=spelling, load=str(run)).is_own
        with pytest.raises(ValueError, match="--finetune begins a run of its own from --load"):
            start(save=spelling, load=str(run), finetune=True)
        with pytest.raises(ValueError, match="--new-stage begins a run of its own from --load"):
            start(save=spelling, load=str(run), new_stage=True)
    assert start(save="fresh/", load="fresh") == StartingPoint()


def test_init_from(run, tmp_path):
    expected = StartingPoint(run, "finetune", is_initial=True)
    assert start(init_from=run, save=tmp_path / "b") == expected
    assert start(init_from=run, save=tmp_path / "b", load=tmp_path / "b") == expected
    write_checkpoint(tmp_path / "b", 2)
    name_latest(tmp_path / "b", 2)
    assert start(init_from=run, save=tmp_path / "b", load=tmp_path / "b") == StartingPoint(tmp_path / "b", is_own=True)


def test_a_release_begins_a_finetune(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert start(load=folder, finetune=True) == StartingPoint(folder, "finetune")
    with pytest.raises(ValueError, match="is a release, which has weights alone: add --finetune"):
        start(load=folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"save": "run"}, "--save run holds a checkpoint, which this run would overwrite: add --load run"),
        ({"save": "run", "init_from": "other"}, "which this run would overwrite"),
        ({"save": "b", "load": "typo"}, "--load typo does not exist: name the --save folder"),
        ({"load": "empty"}, "--load empty holds no checkpoint"),
        ({"load": "file"}, "--load file is a file"),
        ({"load": "data"}, "--load data is a latent dataset"),
        ({"load": "run/iter_0000004"}, "is one checkpoint of a run: name its parent, run"),
        ({"finetune": True}, "--finetune begins with an earlier run's state: give its --save folder as --load"),
        ({"new_stage": True}, "--new-stage begins with an earlier run's state"),
        (
            {"load": "run", "init_from": "other"},
            "--init-from other and --load run both say where the weights",
        ),
        ({"load": "run", "save": "run", "init_from": "b", "finetune": True}, "--init-from b and --finetune both"),
    ],
)
def test_what_would_lose_or_ignore_something_is_refused(flags, words, run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        start(**flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_without_the_latest_file_are_refused(run):
    (run / LATEST_FILE).unlink()
    for flags in ({"save": run}, {"load": run}, {"save": run, "load": run}):
        with pytest.raises(ValueError, match=r"the newest is iter_0000004\) but no latest_.* write 4 into it"):
            start(**flags)
    # What a kill within the first save leaves is no checkpoint.
    (iteration_folder(run, 4) / "checksums.json").unlink()
    assert start(save=run, load=run) == StartingPoint()


def test_a_first_checkpoint_that_was_not_named_before_a_kill_is_named(run):
    (run / LATEST_FILE).unlink()
    write_checkpoint(run, 5, whole=False)
    name_unnamed_checkpoint(run)
    assert latest_iteration(run) == 4
    write_checkpoint(run, 6)
    name_unnamed_checkpoint(run)
    assert latest_iteration(run) == 4


@pytest.mark.parametrize("text", ["seven", "", "-1", "4 5", "٤", "\x00", "99"])
def test_a_damaged_latest_file_is_an_error(text, run):
    (run / LATEST_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="instead of an iteration|does not exist"):
        latest_iteration(run)


STRANGE = ["iter_x", "iter_0000002_keep", "iter_2", "iter_00000002", "iter_", "iter_0000009.tmp", "my_iter_0000001"]


def test_only_whole_checkpoints_count_and_only_those_are_deleted(tmp_path):
    for iteration in (2, 4, 6, 8):
        write_checkpoint(tmp_path, iteration)
    for name in STRANGE:
        write_checkpoint(tmp_path / "made", 1).rename(tmp_path / name)
    half, torn = write_checkpoint(tmp_path, 7, whole=False), iteration_folder(tmp_path, 6)
    (torn / "weights").unlink()
    assert whole_iterations(tmp_path) == [2, 4, 8]
    later = write_checkpoint(tmp_path, 10)
    (tmp_path / ".removed_iter_0000001").mkdir()  # a run was killed while it deleted
    remove_old_checkpoints(tmp_path, newest=8, keep=2)
    assert whole_iterations(tmp_path) == [4, 8, 10]
    kept = {path.name for path in (half, torn, later)} | {"iter_0000004", "iter_0000008", "made", *STRANGE}
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_old_checkpoints(tmp_path, newest=8, keep=0)
    assert whole_iterations(tmp_path) == [4, 8, 10]


def test_a_half_written_folder_does_not_cost_the_last_good_one(tmp_path):
    """Keep one: the newest good checkpoint stays whatever lies beside it."""
    write_checkpoint(tmp_path, 2)
    for iteration in (1, 3, 4):
        write_checkpoint(tmp_path, iteration, whole=False)
    remove_old_checkpoints(tmp_path, newest=2, keep=1)
    assert whole_iterations(tmp_path) == [2]
