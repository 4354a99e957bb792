"""Reads distributed checkpoints in any layout, after the checksums of their files have been compared.

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
    """A checkpoint whose checksums are right, and which runs no code when it is loaded.

    Only `open_checkpoint` and `newest_good_checkpoint` create one.

    Attributes:
        folder: --save folder that holds the checkpoint.
    """

    folder: Path
    iteration: int
    record: RunRecord

    @property
    def path(self) -> Path:
        """The folder of the checkpoint's files."""
        return iteration_folder(self.folder, self.iteration)

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Read the checkpoint into the form of `state`, from whatever layout it was saved; every rank calls this.

        Args:
            state: the state that `plan_checkpoint` takes, or parts of it, in this layout.

        Raises:
            ValueError: the checkpoint lacks a tensor, or its content contradicts its index.
        """
        try:
            with megatron_on_cpu(), weights_only_loads():
                return dist_checkpointing.load(state, str(self.path))
        # Anybody can make files with right checksums, so every error of their readers becomes a refusal.
        except Exception as error:
            raise ValueError(f"{self.path} cannot be loaded: {_one_line(error)}") from error


def open_checkpoint(folder: Path, pgs: ProcessGroups | None = None) -> Checkpoint:
    """Open the newest checkpoint of a --save folder. The ranks share the comparison of its checksums.

    Args:
        pgs: process groups; None for a single process.

    Raises:
        ValueError: there is no checkpoint, or a file of it is missing, damaged or unsafe.
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
    """A checkpoint, or the fault that any rank finds in it. Nothing is unpickled before all checksums are right."""
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
            # The autoencoder's old format is one file, which is read as plain data.
            if not (record.is_old and is_old_autoencoder(source)):
                check_checkpoint(source)
        # Right checksums do not exclude files that were made to deceive, so every error becomes a refusal.
        except Exception as error:
            damage = _one_line(error)
        damage = _any_rank(damage, pgs)
    return (None, damage) if damage is not None else (Checkpoint(folder, iteration, record), "")


def _any_rank(damage: str | None, pgs: ProcessGroups | None) -> str | None:
    return damage if pgs is None else next((found for found in gather_objects(damage) if found), None)


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
