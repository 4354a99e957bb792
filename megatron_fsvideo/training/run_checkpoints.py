"""Loads and saves the checkpoints of a run of any job.

starting_point.py holds the rule, checkpoint/distributed.py reads, checkpoint/writer.py writes. A checkpoint has one
section for each named network, with keys `<network>.{model,ema,optimizer}.*`, and a job.json that describes each.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

from megatron_fsvideo.checkpoint.agreement import check_agreement
from megatron_fsvideo.checkpoint.distributed import Checkpoint, newest_good_checkpoint
from megatron_fsvideo.checkpoint.dit_release import record_of_release
from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder
from megatron_fsvideo.checkpoint.save_folder import name_unnamed_checkpoint
from megatron_fsvideo.checkpoint.sharded_state import ExtraFiles, plan_checkpoint
from megatron_fsvideo.checkpoint.starting_point import StartingPoint, find_starting_point, is_release
from megatron_fsvideo.checkpoint.whole_weights import OldAutoencoder, fill_sharded, is_old_autoencoder
from megatron_fsvideo.checkpoint.writer import CheckpointWriter
from megatron_fsvideo.config import CheckpointConfig
from megatron_fsvideo.data.folder_lock import FolderLock
from megatron_fsvideo.data.outputs import try_folder
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.training.network import TrainedNetwork
from megatron_fsvideo.training.state import TrainState


class RunCheckpoints:
    """Loads and saves a run. Every rank calls each method at the same iterations, except `is_saving`.

    Args:
        describe: returns the run's description without its networks; called at each load and save.
        new_stage: `--new-stage` is given: the data and the schedule change, everything else continues.
        train_iters: iteration at which the run will end.
        extra_files: called on every rank at each save; returns further files that rank 0 writes into the folder.
        initialize: starts the networks from the folder of `--init-from`.

    Raises:
        ValueError: the --save folder cannot be written, or another run writes into it.

    Attributes:
        loaded: record of the checkpoint or release that was loaded; None for initial weights.
        start: starting point of the run, set by `load`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        describe: Callable[[], RunDescription],
        pgs: ProcessGroups,
        *,
        train_iters: int,
        new_stage: bool = False,
        extra_files: Callable[[], ExtraFiles] | None = None,
        initialize: Callable[[Path], None] | None = None,
    ) -> None:
        self.loaded: RunRecord | None = None
        self.start = StartingPoint()
        self._config, self._describe, self._pgs = config, describe, pgs
        self._train_iters, self._new_stage = train_iters, new_stage
        self._extra_files, self._initialize = extra_files, initialize
        self._writer: CheckpointWriter | None = None
        if config.save is not None:
            self._writer = CheckpointWriter(Path(config.save), pgs, config.keep_checkpoints, config.async_save)
            self._lock = FolderLock(Path(config.save), "training")
            pgs.on_rank_zero(self._claim_folder)

    def close(self) -> None:
        """Release the --save folder, so that other runs can write into it."""
        if self._writer is not None and self._pgs.is_rank_zero:
            self._lock.release()

    def load(self, networks: Mapping[str, TrainedNetwork]) -> TrainState:
        """Bring the networks to where the run begins or continues.

        Raises:
            ValueError: there is nothing to load where the flags say, it is damaged, or it does not belong to this run.
        """
        start = self.start = self._pgs.on_rank_zero(lambda: find_starting_point(self._config, self._new_stage))
        if start.folder is None:
            return TrainState()
        if start.is_initial:
            assert self._initialize is not None, "the job refuses --init-from"
            self._initialize(start.folder)
            return TrainState()
        if is_release(start.folder):
            return self._load_release(start.folder, networks)
        return self._load_checkpoint(start, networks)

    def save(self, state: TrainState, networks: Mapping[str, TrainedNetwork]) -> None:
        """Write a checkpoint from which `state.iteration + 1` can be done, or begin to (`async_save`).

        Raises:
            SaveError: this save or the one before failed. FolderLockedError: another run has the folder.
        """
        self._pgs.on_rank_zero(self._lock.check)
        record = RunRecord(state.iteration, state.consumed_samples, _records(networks), self._describe())
        content = {name: network.section() for name, network in networks.items()}
        extra = self._extra_files() if self._extra_files is not None else None
        self._writer.save(
            state.iteration,
            lambda target: plan_checkpoint(
                target,
                content,
                record.to_json(),
                is_rank_zero=self._pgs.is_rank_zero,
                in_background=self._writer.in_background,
                extra=extra,
            ),
        )

    def is_saving(self) -> bool:
        """Whether this rank is still writing a checkpoint in the background; ranks may differ."""
        return self._writer is not None and self._writer.is_writing()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the newest.

        Raises:
            SaveError: the checkpoint could not be written.
        """
        if self._writer is not None:
            self._writer.finish()

    def _claim_folder(self) -> None:
        """Lock the folder; fail before the first save if it cannot be written or belongs to another run."""
        try_folder(self._config.save)
        self._lock.acquire()
        if self._lock.was_abandoned:
            name_unnamed_checkpoint(Path(self._config.save))

    def _load_checkpoint(self, start: StartingPoint, networks: Mapping[str, TrainedNetwork]) -> TrainState:
        checkpoint = newest_good_checkpoint(start.folder, self._pgs)
        assert checkpoint is not None, "the starting point has a checkpoint"
        saved, where = checkpoint.record, str(start.folder)
        check_agreement(saved, _records(networks), self._describe(), where, start.purpose)
        if start.purpose == "stage" and saved.iteration >= self._train_iters:
            raise ValueError(
                f"train_iters {self._train_iters} leaves the new stage no iteration: {where} has done "
                f"{saved.iteration}, which train_iters counts too"
            )
        if start.is_own:
            self._writer.resume_from(checkpoint.iteration)
        self.loaded = saved
        wanted = {name: network for name, network in networks.items() if name in saved.networks}
        if not wanted:
            raise ValueError(f"the checkpoint {where} holds {_names(saved.networks)}, not {_names(networks)}")
        _read(checkpoint, wanted, with_optimizer=start.purpose != "finetune")
        self._note_fresh(networks, wanted)
        if start.purpose == "finetune":
            return TrainState()
        return TrainState(saved.iteration, 0 if start.purpose == "stage" else saved.consumed_samples)

    def _load_release(self, folder: Path, networks: Mapping[str, TrainedNetwork]) -> TrainState:
        saved = record_of_release(folder)
        check_agreement(saved, _records(networks), self._describe(), str(folder), "finetune")
        self.loaded = saved
        (name,) = saved.networks
        if name not in networks:
            raise ValueError(f"--load {folder} is a release of {name}, this run trains {_names(networks)}")
        network = networks[name]
        state = network.section(with_optimizer=False, with_average=False)
        content = fill_sharded(state, SafetensorsFolder(folder), f"{name}.model.", f"--load {folder}")
        network.load_section(content, with_optimizer=False, with_average=False)
        self._note_fresh(networks, {name: network})
        return TrainState()

    def _note_fresh(self, networks: Mapping[str, TrainedNetwork], loaded: Mapping[str, TrainedNetwork]) -> None:
        fresh = [name for name in networks if name not in loaded]
        if fresh and self._pgs.is_rank_zero:
            print(f"{self._config.load} has no {' and no '.join(fresh)}: starts fresh", file=sys.stderr, flush=True)


def _read(checkpoint: Checkpoint, networks: Mapping[str, TrainedNetwork], with_optimizer: bool) -> None:
    saved = checkpoint.record
    averages = {name: saved.networks[name]["average"] for name in networks}
    state = {
        name: network.section(with_optimizer=with_optimizer, with_average=averages[name])
        for name, network in networks.items()
    }
    if is_old_autoencoder(checkpoint.path):
        content = {name: _read_old_autoencoder(checkpoint.path, name, part) for name, part in state.items()}
    else:
        for name, part in state.items():
            # In earlier versions the keys of the only network lacked its name.
            prefixes = {f"{name}.model.": saved.model_prefix(name), f"{name}.ema.": saved.average_prefix(name)}
            apply_prefix_mapping(part, prefixes)
        content = checkpoint.load(state)
    for name, network in networks.items():
        network.load_section(content[name], with_optimizer=with_optimizer, with_average=averages[name])


def _read_old_autoencoder(path: Path, name: str, state: dict[str, Any]) -> dict[str, Any]:
    kinds = {"model": "weights", "ema": "ema"}
    return {
        part: fill_sharded({"": tensors}, OldAutoencoder(path, kinds[part]), f"{name}.{part}.", str(path))[""]
        for part, tensors in state.items()
    }


def _records(networks: Mapping[str, TrainedNetwork]) -> dict[str, dict[str, Any]]:
    return {name: network.record() for name, network in networks.items()}


def _names(networks: Mapping[str, Any]) -> str:
    return " and ".join(networks) or "no network"
