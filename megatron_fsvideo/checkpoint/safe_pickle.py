"""Loads checkpoints from strangers without running code from them.

A distributed checkpoint has three places from which Python objects are unpickled: `.metadata` (torch's reader calls
`pickle.load`), `common.pt` (`torch.load`), and byte entries among the tensors (`torch.load` with `weights_only=False`).
`check_checkpoint` reads the first with an allow-list and refuses anything else in it, byte entries included;
`weights_only_loads` makes every `torch.load` inside refuse objects that are not plain data.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

_INDEX = "torch.distributed.checkpoint.metadata"
_PLAN = "torch.distributed.checkpoint.planner"
# What is in the `.metadata` files that megatron-core 0.16 with torch 2.13 writes. BytesStorageMetadata is left out on
# purpose: it would send a tensor's bytes to the unpickler.
_ALLOWED = {
    *((_INDEX, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex")),
    *((_INDEX, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")),
    *((_PLAN, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")),
}


class UnsafeCheckpointError(ValueError):
    """A checkpoint file holds objects that are not plain data."""


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeCheckpointError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Any:
    """Unpickle a `.metadata` file, accepting only the classes that a checkpoint's index is made of.

    Raises:
        UnsafeCheckpointError: the file has another class. FileNotFoundError: it is missing. ValueError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            return _AllowListUnpickler(file).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path} is refused: {error}, which no checkpoint index needs") from None
    except FileNotFoundError:
        raise
    # An unpickler raises many kinds of errors on a damaged file.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_common(path: Path) -> dict[str, Any]:
    """Load `common.pt` as plain data.

    Raises:
        UnsafeCheckpointError: the file holds other objects, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsafeCheckpointError(f"{path} is refused: not plain data, or damaged ({reason})") from None


def check_checkpoint(folder: Path) -> None:
    """Check that loading this checkpoint folder runs no code, and that its files are whole.

    Raises:
        UnsafeCheckpointError: loading could run code. ValueError, FileNotFoundError: a file is damaged or missing.
    """
    metadata = read_metadata(folder / METADATA_FILE)
    read_common(folder / COMMON_FILE)
    sizes: dict[str, int] = {}
    for part in metadata.storage_data.values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise ValueError(f"{path} is damaged or missing: it has {found} of {size} bytes; take an older checkpoint")


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Context in which `torch.load` loads plain data only, whatever its caller asks for."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
