"""Folders of safetensors shards, read and written tensor by tensor.

    NAME.safetensors                                               one shard
    NAME-00001-of-00003.safetensors ... NAME.safetensors.index.json    several shards, and the shard of each tensor

diffusers and transformers use this layout. At most one tensor is in memory at a time. (The library's reader maps
whole files writably, which the kernel refuses for a file larger than the machine's memory.) Writing streams: the header
follows from shapes and dtypes alone.
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
from torch import Tensor

from megatron_fsvideo.data.listing import files_in
from megatron_fsvideo.data.outputs import write_json
from megatron_fsvideo.data.text_files import read_json

# Number formats of weights, under safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """Shape and number format of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a folder.

    Attributes:
        infos: tensor name -> shape and number format.

    Raises:
        ValueError: the folder has no or several sets of weights, a shard is missing or damaged, the index does not
            agree with the shards, or a number format is not one of weights.
    """

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, tuple[Path, int]] = {}
        self.infos: dict[str, TensorInfo] = {}
        paths, index = _find_shards(folder)
        for path in paths:
            self._scan(path)
        if index is not None:
            _check_index(folder, index, {name: path for name, (path, _) in self._place.items()})

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            ValueError: the file is shorter than it was when it was opened.
        """
        info, (path, position) = self.infos[name], self._place[name]
        content = torch.empty(info.num_bytes, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(position)
            if file.readinto(content.numpy().data) != info.num_bytes:
                raise ValueError(f"{path} is damaged: it ends within {name}")
        return content.view(info.dtype).reshape(info.shape)

    def _scan(self, path: Path) -> None:
        for name, (info, position) in read_header(path).items():
            if name in self._place:
                raise ValueError(f"{name} is in {self._place[name][0]} and in {path}")
            self._place[name], self.infos[name] = (path, position), info


def read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Read a file's header: tensor name -> shape and number format, and the offset of its data in the file.

    Raises:
        ValueError: the file is missing or damaged, or has a tensor in another number format than weights come in.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for name, v in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or missing: {error!r}") from error
    found, end = {}, 0
    for name, (word, shape, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if word not in DTYPES:
            raise ValueError(f"{path}: {name} is {word}; weights are read as {', '.join(DTYPES)}")
        info = TensorInfo(shape, DTYPES[word])
        if start != end or stop - start != info.num_bytes or min(shape, default=0) < 0:
            raise ValueError(f"{path} is damaged: {name} {list(shape)} is said to be in bytes {start} to {stop}")
        found[name], end = (info, 8 + length + start), stop
    if 8 + length + end != size:
        raise ValueError(f"{path} is damaged or missing: it has {size} bytes, its tensors need {8 + length + end}")
    return found


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
        infos: name -> shape and number format of `read(name)`. Tensors are read once, in this order, and dropped.
        max_shard_size: largest size of a shard in bytes; a larger tensor gets a shard of its own.
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
        write_json(folder / f"{basename}.safetensors.index.json", index)


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
    """Convert a size such as 5GB or 500MB (powers of 1000) to bytes.

    Raises:
        ValueError: the text is not a size.
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
    """Find the shards of a folder, and the tensor -> file name map of its index if it has one."""
    indices = files_in(folder, ".safetensors.index.json")
    if len(indices) > 1:
        raise ValueError(f"{folder} has several sets of weights: {', '.join(path.name for path in indices)}")
    if indices:
        try:
            index = read_json(indices[0])["weight_map"]
            names = sorted(set(index.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{indices[0]} is damaged: {error!r}") from error
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{indices[0]} refers to {strange[0]!r}, which is not a file beside it")
        return [folder / name for name in names], index
    paths = files_in(folder, ".safetensors")
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
