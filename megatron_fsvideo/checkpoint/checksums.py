"""Checksums of a checkpoint's files: a size does not show a flipped bit or a lost block."""

import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_fsvideo.data.outputs import write_text

CHECKSUM_FILE = "checksums.json"
_BLOCK = 1 << 22


class ChecksummedFile(io.BufferedWriter):
    """A new file that is written from start to end, with a checksum.

    Attributes:
        crc32: checksum of all bytes written so far.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "wb"), _BLOCK)
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)

    def sync(self) -> None:
        """Return when the written bytes are on the disk."""
        self.flush()
        os.fsync(self.fileno())


def file_crc32(path: Path) -> int:
    """Checksum of a file on disk."""
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Map each file name to its checksum."""
    return {name: file_crc32(folder / name) for name in names}


def read_checksums(folder: Path) -> dict[str, int]:
    """Read checksums.json of a folder: file name -> checksum.

    Raises:
        ValueError: checksums.json is missing or damaged.
    """
    path = folder / CHECKSUM_FILE
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): {folder} is no complete checkpoint") from error
    if not isinstance(expected, dict) or not all(isinstance(value, int) for value in expected.values()):
        raise ValueError(f"{path} is damaged: it holds something other than checksums")
    if strange := [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path} is damaged: it names {strange[0]!r}, which is outside of the checkpoint")
    return expected


def check_files(folder: Path, rank: int = 0, world_size: int = 1, under: str = "") -> None:
    """Compare this rank's share of a folder's files with its checksums.json.

    Args:
        under: subfolder to compare; by default the whole folder.

    Raises:
        ValueError: the list or a file is missing, or has changed since it was written. OSError: a file is unreadable.
    """
    expected = read_checksums(folder)
    names = sorted(name for name in expected if not under or name.startswith(f"{under}/"))
    for name in names[rank::world_size]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is damaged or missing: the checkpoint was written with it")
        if (found := file_crc32(folder / name)) != expected[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum is {found:08x}, was {expected[name]:08x}")


def write_checksums(folder: Path, checksums: Mapping[str, int]) -> None:
    """Write checksums.json, which says that a folder is complete."""
    write_text(folder / CHECKSUM_FILE, json.dumps(checksums, indent=1, sort_keys=True) + "\n")
