"""The weights in a distributed checkpoint, read and written tensor by tensor by one process.

`dist_checkpointing` gives each rank its slices of everything at once. A conversion wants whole tensors, one at a time:
the files are torch's distributed checkpoints, whose index says where in which file each slice of a tensor is.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata

from megatron_fsvideo.checkpoint.safe_pickle import (
    COMMON_FILE,
    METADATA_FILE,
    UnsafeCheckpointError,
    check_checkpoint,
    read_metadata,
)
from megatron_fsvideo.checkpoint.safetensors_shards import TensorInfo

_TENSOR_FILE = "__0_0.distcp"


class DistributedWeights:
    """The tensors of one checkpoint folder (iter_0000100) whose keys start with `prefix`.

    Attributes:
        infos: key without the prefix -> description of the tensor.

    Raises:
        ValueError: the checkpoint is damaged, or holds something other than data.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        check_checkpoint(folder)
        metadata = read_metadata(folder / METADATA_FILE)
        self.folder, self.prefix = folder, prefix
        self.infos: dict[str, TensorInfo] = {}
        self._parts: dict[str, list[tuple[MetadataIndex, Any]]] = {}
        try:
            self._index(metadata)
        except ValueError:
            raise
        # Only the classes have been checked so far, not their content.
        except Exception as error:
            raise ValueError(f"{folder / METADATA_FILE} is damaged: {error!r}") from error

    def _index(self, metadata: Any) -> None:
        folder, prefix = self.folder, self.prefix
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                self.infos[key.removeprefix(prefix)] = TensorInfo(tuple(entry.size), entry.properties.dtype)
        for index, place in metadata.storage_data.items():
            if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                raise ValueError(f"{folder / METADATA_FILE} is refused: {index.fqn} is in {place.relative_path!r}")
            self._parts.setdefault(index.fqn, []).append((index, place))

    def read(self, name: str) -> Tensor:
        """A whole tensor, put together from its slices.

        Raises:
            UnsafeCheckpointError: a slice holds something other than a tensor. ValueError: the slices do not fill it.
        """
        info, key = self.infos[name], self.prefix + name
        try:
            whole, filled = self._put_together(name, info, self._parts.get(key, []))
        except ValueError:
            raise
        # The stored offsets of slices have not been checked yet.
        except Exception as error:
            raise ValueError(f"{self.folder}: {key} is damaged: {str(error).splitlines()[0]}") from error
        if tuple(whole.shape) != info.shape or filled != whole.numel():
            raise ValueError(f"{self.folder}: {filled} of the elements of {key} {list(info.shape)} are stored")
        return whole

    def _put_together(self, name: str, info: TensorInfo, parts: list[tuple[MetadataIndex, Any]]) -> tuple[Tensor, int]:
        """The tensor, and how many of its elements were stored."""
        if len(parts) == 1:
            whole = self._load(name, parts[0][1])
            filled = whole.numel()
        else:
            whole, filled = torch.empty(info.shape, dtype=info.dtype), 0
            for index, place in parts:
                part = self._load(name, place)
                slices = tuple(slice(start, start + size) for start, size in zip(index.offset, part.shape, strict=True))
                whole[slices] = part
                filled += part.numel()
        return whole, filled

    def _load(self, name: str, place: Any) -> Tensor:
        path = self.folder / place.relative_path
        with path.open("rb") as file:
            try:
                return torch.load(_FilePart(file, place.offset, place.length), map_location="cpu", weights_only=True)
            # torch's parser raises many kinds of errors on a damaged file.
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                raise UnsafeCheckpointError(
                    f"{name} in {path} is refused: not a plain tensor, or damaged ({reason})"
                ) from None


def write_distributed_weights(
    folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], common: dict[str, Any]
) -> None:
    """Write whole tensors as a distributed checkpoint that `dist_checkpointing.load` reads at any layout.

    Args:
        infos: key -> description of the tensor that `read(key)` returns. Each is read once and dropped.
        common: plain data that every rank loads.
    """
    # torch makes the plan with empty tensors. Its own writer would keep all written tensors until the end.
    empty = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in infos.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(empty, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
    places = []
    with (folder / _TENSOR_FILE).open("wb") as file:
        for item in plan.items:
            transforms, tensor = _StorageWriterTransforms(), read(item.index.fqn)
            # torch.save would write a view together with its whole base tensor.
            tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
            places.append(_write_item(transforms, file, tensor, item, _TENSOR_FILE, SerializationFormat.TORCH_SAVE))
        file.flush()
        os.fsync(file.fileno())
    # Megatron's planner leaves planner_data in this form.
    _Writer(folder).finish(dataclasses.replace(metadata, planner_data={}), [places])
    torch.save(common, folder / COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Writer(FileSystemWriter):
    """Writes the index of the checkpoint."""

    def storage_meta(self) -> StorageMeta:
        """Omit the path of the folder: it is private, and its class is one that `safe_pickle` refuses."""
        return StorageMeta()


class _FilePart(io.RawIOBase):
    """Part of a file as a file object: `torch.load` needs one, and a BytesIO would be a second copy."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, start + position)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        wanted = min(len(view), max(0, self.length - self.position))
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(view[:wanted])
        self.position += count
        return count
