"""Folders of safetensors shards, read and written tensor by tensor.

    NAME.safetensors                                               one shard
    NAME-00001-of-00003.safetensors ... NAME.safetensors.index.json    several, and which tensor is in which

The layout of diffusers and transformers. Reading maps files into memory: a tensor costs none until it is changed.
Writing streams: the header follows from shapes and dtypes alone, so a shard is never in memory.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' words for the number formats that weights come in.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a folder.

    Attributes:
        infos: tensor name -> what it is.

    Raises:
        ValueError: no or several sets of weights, a shard that is missing or damaged, an index that does not agree
            with its shards, a number format that weights do not come in.
    """

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.infos: dict[str, TensorInfo] = {}
        paths, index = _find_shards(folder)
        for path in paths:
            self._scan(path)
        if index is not None:
            _check_index(folder, index, self._place)

    def read(self, name: str) -> Tensor:
        """A tensor that aliases the file: clone it before changing it in place."""
        return self._open[self._place[name]].get_tensor(name)

    def _scan(self, path: Path) -> None:
        try:
            self._open[path] = file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or missing: {error}") from error
        for name in file.keys():  # noqa: SIM118  not a mapping
            if name in self._place:
                raise ValueError(f"{name} is in {self._place[name]} and in {path}")
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} is {view.get_dtype()}; weights are read as {', '.join(DTYPES)}")
            self._place[name] = path
            self.infos[name] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])


def write_shards(
    folder: Path,
    basename: str,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    max_shard_size: int,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as shards, and an index if there are several.

    Args:
        infos: name -> what `read(name)` will return. It is read once, in this order, and dropped.
        max_shard_size: bytes of a shard's tensors; a larger tensor gets a shard of its own.
        metadata: strings stored in each shard's header.
    """
    shards = split_into_shards(infos, max_shard_size)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_name = f"{basename}{part}.safetensors"
        _write_shard(folder / file_name, {name: infos[name] for name in names}, read, metadata)
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{basename}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def split_into_shards(infos: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    """Names in order, cut so that no shard has more bytes than `max_shard_size` unless it is one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.num_bytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.num_bytes
    return shards


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB (powers of 1000).

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B)", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"a size is a positive number with a unit, as 5GB or 500MB; got {text!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _write_shard(
    path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in infos.items():
        end = position + info.num_bytes
        header[name] = {"dtype": _WORDS[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), name
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of a folder, and the index's tensor -> file name where there is one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has several sets of weights: {', '.join(path.name for path in indices)}")
    if indices:
        try:
            index = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(index.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{indices[0]} is damaged: {error!r}") from error
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{indices[0]} refers to {strange[0]!r}, which is not a file beside it")
        return [folder / name for name in names], index
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise ValueError(f"{folder} needs one .safetensors file, or several with an index; it has {found}")
    return paths, None


def _check_index(folder: Path, index: dict[str, str], place: dict[str, Path]) -> None:
    found = {name: path.name for name, path in place.items()}
    if wrong := sorted(name for name in set(index) | set(found) if index.get(name) != found.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{folder}: index and shards disagree on {len(wrong)} tensors, first {name}: index "
            f"{index.get(name, 'none')}, shards {found.get(name, 'none')}"
        )
