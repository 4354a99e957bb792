"""Distributed checkpoints: every rank writes its slices, and any other layout can read them.

    SAVE/latest_checkpointed_iteration.txt      the newest complete checkpoint; replaced last, by rename
    SAVE/iter_0000100/job.json                  the resolved job and what the data was
    SAVE/iter_0000100/checksums.json            of all other files
    SAVE/iter_0000100/...                       megatron-core's dist_checkpointing, format torch_dist

A run that is killed while it saves leaves a folder that the text file does not name; it is written over later.
Writing is the business of writer.py and sharded_state.py.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_fsvideo.checkpoint.checksums import check_files
from megatron_fsvideo.checkpoint.safe_pickle import check_checkpoint, weights_only_loads
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups, broadcast_object, gather_objects

LATEST_FILE = "latest_checkpointed_iteration.txt"
JOB_FILE = "job.json"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration's checkpoint is kept."""
    return folder / f"iter_{iteration:07d}"


def check_save_folder(save: str | None, load: str | None) -> None:
    """Refuse a run that starts anew in a folder that holds another's checkpoints.

    Raises:
        ValueError: saying how to continue that one.
    """
    if save is not None and load is None and latest_iteration(Path(save)) is not None:
        raise ValueError(
            f"--save {save} holds a checkpoint, which this run would overwrite: add --load {save} to continue it, or "
            "save into another folder"
        )


def latest_iteration(folder: Path) -> int | None:
    """Iteration of the newest complete checkpoint, or None if there is none.

    Raises:
        ValueError: the text file is damaged, or names a folder that does not exist.
    """
    path = folder / LATEST_FILE
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        raise ValueError(f"{path} holds {text[:40]!r} instead of an iteration")
    if not iteration_folder(folder, int(text)).is_dir():
        raise ValueError(f"{path} names iteration {text}, but {iteration_folder(folder, int(text))} does not exist")
    return int(text)


def newest_good_iteration(folder: Path, pgs: ProcessGroups, check: Callable[[Path], None]) -> int | None:
    """Iteration of the newest complete checkpoint whose files are as they were written, or None if there is none.

    Older ones are tried, with a warning, when the newest is damaged. Every rank calls this and reads a share.

    Args:
        check: raises ValueError or OSError if the checkpoint in a folder cannot be loaded.

    Raises:
        ValueError: all of them are damaged; the message is about the newest.
    """
    newest = latest_iteration(folder)
    if newest is None:
        return None
    found = sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*") if path.is_dir())
    candidates = broadcast_object([iteration for iteration in reversed(found) if iteration <= newest])
    damages: list[str] = []
    for iteration in candidates:
        damage = _agreed_damage(folder, iteration, pgs, check)
        if damage is None:
            if damages and pgs.is_rank_zero:
                found = f"iteration {iteration}, the newest checkpoint that is whole"
                print(f"warning: {damages[0]}. Continuing from {found}", file=sys.stderr, flush=True)
            return iteration
        damages.append(damage)
    raise ValueError(damages[0])


def _agreed_damage(folder: Path, iteration: int, pgs: ProcessGroups, check: Callable[[Path], None]) -> str | None:
    """What any rank finds wrong with a checkpoint."""
    damage = None
    source = iteration_folder(folder, iteration)
    try:
        read_record(folder, iteration)
        check(source)
        check_files(source, pgs.rank, pgs.world_size)
    except (ValueError, OSError) as error:
        damage = str(error)
    return next((damage for damage in gather_objects(damage) if damage), None)


def load_checkpoint(folder: Path, iteration: int, state: dict[str, Any]) -> dict[str, Any]:
    """Read one checkpoint into the shape of `state`, whatever layout it was saved from; every rank calls this.

    Args:
        state: what `plan_checkpoint` got, of this layout; or parts of it.

    Raises:
        ValueError: the checkpoint is damaged, lacks a tensor, or holds something other than data.
    """
    source = iteration_folder(folder, iteration)
    check_checkpoint(source)
    with megatron_on_cpu(), weights_only_loads():
        return dist_checkpointing.load(state, str(source))


def name_latest(folder: Path, iteration: int) -> None:
    """Make a checkpoint the one that a restarted run continues from."""
    write_text_atomically(folder / LATEST_FILE, f"{iteration}\n")


def read_record(folder: Path, iteration: int) -> dict[str, Any]:
    """The job.json of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = iteration_folder(folder, iteration) / JOB_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): not a checkpoint of this program") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_old_checkpoints(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `newest`; 0 deletes none."""
    if keep <= 0:
        return
    # Later ones are leftovers of a run that was restarted from an earlier checkpoint.
    saved = sorted(p for p in folder.glob("iter_*") if p.is_dir() and p.name <= iteration_folder(folder, newest).name)
    for old in saved[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
