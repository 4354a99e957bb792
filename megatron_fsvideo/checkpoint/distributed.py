"""Distributed checkpoints are read here: in any layout, never before their files are known to be as they were written.

A checkpoint's folder holds megatron-core's dist_checkpointing, format torch_dist. save_folder.py says where it lies;
writer.py and sharded_state.py write it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_fsvideo.checkpoint.checksums import check_files
from megatron_fsvideo.checkpoint.run_record import RunRecord, parse_record
from megatron_fsvideo.checkpoint.safe_pickle import check_checkpoint, weights_only_loads
from megatron_fsvideo.checkpoint.save_folder import (
    describe_folder,
    iteration_folder,
    latest_iteration,
    read_record,
    whole_iterations,
)
from megatron_fsvideo.checkpoint.whole_weights import is_old_autoencoder
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups, broadcast_object, gather_objects


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written, and which runs no code when it is loaded.

    Made by `open_checkpoint` and `newest_good_checkpoint` only.

    Attributes:
        folder: the --save folder it lies in.
    """

    folder: Path
    iteration: int
    record: RunRecord

    @property
    def path(self) -> Path:
        """The folder of its files."""
        return iteration_folder(self.folder, self.iteration)

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Read it into the shape of `state`, whatever layout it was saved from; every rank calls this.

        Args:
            state: what `plan_checkpoint` got, of this layout; or parts of it.

        Raises:
            ValueError: it lacks a tensor, or its files are not what they say.
        """
        try:
            with megatron_on_cpu(), weights_only_loads():
                return dist_checkpointing.load(state, str(self.path))
        # Files with fitting checksums may have been made by anybody: what their readers raise is a refusal.
        except Exception as error:
            raise ValueError(f"{self.path} cannot be loaded: {_one_line(error)}") from error


def open_checkpoint(folder: Path, pgs: ProcessGroups | None = None) -> Checkpoint:
    """The newest checkpoint of a --save folder; the files' checksums are compared, shared out over the ranks.

    Args:
        pgs: None for a process alone.

    Raises:
        ValueError: there is none, or a file is missing, damaged or unsafe.
    """
    iteration = latest_iteration(folder)
    if iteration is None:
        raise ValueError(f"{folder} {describe_folder(folder)}: name the --save folder of a training run, or a release")
    checkpoint, damage = _verified(folder, iteration, pgs)
    if checkpoint is None:
        raise ValueError(damage)
    return checkpoint


def newest_good_checkpoint(folder: Path, pgs: ProcessGroups) -> Checkpoint | None:
    """The newest checkpoint that can be loaded, or None if the folder has none; every rank calls this.

    Older ones are tried, with a warning, when the newest is damaged.

    Raises:
        ValueError: all of them are damaged; the message is about the newest.
    """
    newest = latest_iteration(folder)
    if newest is None:
        return None
    older = [iteration for iteration in reversed(whole_iterations(folder)) if iteration < newest]
    damages: list[str] = []
    for iteration in broadcast_object([newest, *older]):
        checkpoint, damage = _verified(folder, iteration, pgs)
        if checkpoint is not None:
            if damages and pgs.is_rank_zero:
                found = f"iteration {iteration}, the newest checkpoint that is whole"
                print(f"warning: {damages[0]}. Continuing from {found}", file=sys.stderr, flush=True)
            return checkpoint
        damages.append(damage)
    raise ValueError(damages[0])


def _verified(folder: Path, iteration: int, pgs: ProcessGroups | None) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or what any rank finds wrong with it. Nothing is unpickled before all checksums have been right."""
    source = iteration_folder(folder, iteration)
    rank, world_size = (0, 1) if pgs is None else (pgs.rank, pgs.world_size)
    damage = record = None
    try:
        check_files(source, rank, world_size)
    except (ValueError, OSError) as error:
        damage = _one_line(error)
    damage = _any_rank(damage, pgs)
    if damage is None:
        try:
            record = parse_record(read_record(folder, iteration), str(source))
            # The autoencoder's training had another format, of one file that is read as plain data.
            if not (record.is_old and is_old_autoencoder(source)):
                check_checkpoint(source)
        # Checksums that fit say nothing about files that were made to deceive: whatever they raise is a refusal.
        except Exception as error:
            damage = _one_line(error)
        damage = _any_rank(damage, pgs)
    return (None, damage) if damage is not None else (Checkpoint(folder, iteration, record), "")


def _any_rank(damage: str | None, pgs: ProcessGroups | None) -> str | None:
    return damage if pgs is None else next((found for found in gather_objects(damage) if found), None)


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
