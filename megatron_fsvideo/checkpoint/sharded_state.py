"""Plans with megatron-core, and writes, each rank's part of a state of Megatron's sharded tensors.

megatron-core's own writer forks processes, does not copy tensors that are on the CPU, and lets rank 0 fail alone.
"""

import io
import json
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fsvideo.checkpoint.checksums import ChecksummedFile, checksums_of, write_checksums
from megatron_fsvideo.checkpoint.safe_pickle import COMMON_FILE, METADATA_FILE
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE
from megatron_fsvideo.checkpoint.writer import Work
from megatron_fsvideo.data.outputs import write_text
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu

BACKEND, VERSION = "torch_dist", 1
CONFIG_FILE = "metadata.json"  # name that megatron-core uses

# Measured number of bytes that torch.save adds to a tensor.
_WRAPPING = 1600

# (file name -> checksum of one rank's files, position of each tensor in them)
Written = tuple[dict[str, int], list[WriteResult]]


@dataclass(frozen=True)
class ExtraFiles:
    """Further files that rank 0 writes into a checkpoint's folder; the checksums cover them.

    Attributes:
        num_bytes: about.
        write: called with the folder; writes the files and returns their names relative to it. It may run in a thread
            during training, as `Work.write` may.
    """

    num_bytes: int
    write: Callable[[Path], list[str]]


def plan_checkpoint(
    target: Path,
    state: dict[str, Any],
    record: dict[str, Any],
    *,
    is_rank_zero: bool,
    in_background: bool,
    extra: ExtraFiles | None = None,
) -> Work:
    """Divide the writing among the ranks; every rank calls this.

    Args:
        target: an empty folder.
        state: nested dict of Megatron's ShardedTensors, and plain data that is equal on all ranks.
        record: JSON-able content of job.json.
        in_background: copy everything now, because it will change while it is written.
        extra: further files, on rank 0; None if there are none.
    """
    planner = _Planner(BACKEND, VERSION, thread_count=1)
    # Megatron's queue would start a manager process that imports the whole program again. This queue stays empty.
    filesystem_async._results_queue = queue.Queue()
    with megatron_on_cpu():
        tensors, common = save_preprocess(state)
        planner.async_save(tensors, target)
    files = [_File(name, items, in_background) for _, name, items in planner.writer.write_buckets]
    plain = io.BytesIO()
    if is_rank_zero:
        torch.save(common, plain)

    def write() -> Written:
        checksums, places = {}, []
        if is_rank_zero:
            with ChecksummedFile(target / COMMON_FILE) as file:
                file.write(plain.getvalue())
                file.sync()
            checksums[COMMON_FILE] = file.crc32
        for part in files:
            checksums[part.name] = part.write(target, places)
        if is_rank_zero and extra is not None:
            names = extra.write(target)
            for name in names:
                with (target / name).open("rb") as file:
                    os.fsync(file.fileno())
            checksums |= checksums_of(target, names)
        return checksums, places

    def complete(results: list[Written]) -> None:
        planner.writer.finish(planner.metadata, [places for _, places in results])
        save_config(CheckpointingConfig(BACKEND, VERSION), str(target))
        write_text(target / JOB_FILE, json.dumps(record, indent=1) + "\n")
        checksums = checksums_of(target, (METADATA_FILE, CONFIG_FILE, JOB_FILE))
        for written, _ in results:
            checksums |= written
        write_checksums(target, checksums)

    num_bytes = sum(part.num_bytes for part in files) + len(plain.getvalue())
    if is_rank_zero and extra is not None:
        num_bytes += extra.num_bytes
    return Work(num_bytes, write, complete)


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's saving strategy, stopped before it begins to write.

    Attributes:
        writer: knows this rank's tensors and the files they go to.
        metadata: the index of all ranks' tensors; on rank 0.
    """

    def _get_save_and_finalize_callbacks(
        self, writer: filesystem_async.FileSystemWriterAsync, planned: tuple[Any, Metadata | None, Any]
    ) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


class _File:
    """One file that this rank writes."""

    def __init__(self, name: str, items: tuple[list, list[tuple[WriteItem, Tensor]]], copied: bool) -> None:
        objects, tensors = items
        assert not objects, "only tensors and plain data are saved: anything else would be a pickle"
        self.name = name
        self.tensors = [(item, tensor.to("cpu", copy=True) if copied else tensor) for item, tensor in tensors]
        self.num_bytes = sum(tensor.numel() * tensor.itemsize + _WRAPPING for _, tensor in self.tensors)

    def write(self, folder: Path, places: list[WriteResult]) -> int:
        """Write the file and return its checksum."""
        with ChecksummedFile(folder / self.name) as file:
            for item, tensor in self.tensors:
                transforms = _StorageWriterTransforms()
                places.append(
                    _write_item(transforms, file, tensor.cpu(), item, self.name, SerializationFormat.TORCH_SAVE)
                )
            file.sync()
        return file.crc32
