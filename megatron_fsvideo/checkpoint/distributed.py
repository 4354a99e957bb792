"""Distributed checkpoints: every rank writes its slices, and any other layout can read them.

    SAVE/latest_checkpointed_iteration.txt      the newest complete checkpoint; replaced last, by rename
    SAVE/iter_0000100/job.json                  the resolved job and what the data was
    SAVE/iter_0000100/...                       megatron-core's dist_checkpointing, format torch_dist

A run that is killed while it saves leaves a folder that the text file does not name; it is written over later.
"""

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistSaveShardedStrategy,
)

from megatron_fsvideo.checkpoint.safe_pickle import check_checkpoint, weights_only_loads
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups, barrier

LATEST_FILE = "latest_checkpointed_iteration.txt"
JOB_FILE = "job.json"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration's checkpoint is kept."""
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int | None:
    """Iteration of the newest complete checkpoint, or None if there is none.

    Raises:
        ValueError: the text file is damaged, or names a folder that does not exist.
    """
    path = folder / LATEST_FILE
    if not path.exists():
        return None
    text = path.read_text().strip()
    if not text.isdecimal():
        raise ValueError(f"{path} holds {text[:40]!r} instead of an iteration")
    if not iteration_folder(folder, int(text)).is_dir():
        raise ValueError(f"{path} names iteration {text}, but {iteration_folder(folder, int(text))} does not exist")
    return int(text)


def save_checkpoint(
    folder: Path,
    iteration: int,
    state: dict[str, Any],
    record: dict[str, Any],
    pgs: ProcessGroups,
    keep: int = 0,
) -> None:
    """Write one checkpoint; every rank calls this.

    Args:
        state: nested dict of Megatron's ShardedTensors, and plain data that is equal on all ranks.
        record: JSON-able; becomes job.json.
        keep: newest checkpoints that are kept; 0 keeps all.
    """
    target = iteration_folder(folder, iteration)
    if pgs.is_rank_zero:
        shutil.rmtree(target, ignore_errors=True)  # what a killed run left half-written
        target.mkdir(parents=True)
    barrier()
    # Megatron's queue would start a manager process that imports the whole program again; this save waits, so a plain
    # queue does.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    with megatron_on_cpu():
        dist_checkpointing.save(state, str(target), sharded_strategy=strategy)
    if pgs.is_rank_zero:
        write_text_atomically(target / JOB_FILE, json.dumps(record, indent=1) + "\n")
        write_text_atomically(folder / LATEST_FILE, f"{iteration}\n")
        remove_old_checkpoints(folder, iteration, keep)
    barrier()


def load_checkpoint(folder: Path, iteration: int, state: dict[str, Any]) -> dict[str, Any]:
    """Read one checkpoint into the shape of `state`, whatever layout it was saved from; every rank calls this.

    Args:
        state: what `save_checkpoint` got, of this layout; or parts of it.

    Raises:
        ValueError: the checkpoint is damaged, lacks a tensor, or holds something other than data.
    """
    source = iteration_folder(folder, iteration)
    check_checkpoint(source)
    with megatron_on_cpu(), weights_only_loads():
        return dist_checkpointing.load(state, str(source))


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
