"""Checksums of a checkpoint's files: a size says nothing about a bit that fell over, or about a block that was lost."""

import io
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

CHECKSUM_FILE = "checksums.json"
_BLOCK = 1 << 22


class ChecksummedFile(io.BufferedWriter):
    """A new file that is only appended to.

    Attributes:
        crc32: of everything written so far.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "wb"), _BLOCK)
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append."""
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)

    def sync(self) -> None:
        """Return when the disk has it."""
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
    """File name -> checksum."""
    return {name: file_crc32(folder / name) for name in names}


def check_files(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare this rank's share of a checkpoint's files with its list; without a list (an old checkpoint) nothing.

    Raises:
        ValueError: a file is missing or has changed since it was written.
    """
    path = folder / CHECKSUM_FILE
    if not path.exists():
        return
    try:
        expected: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name in sorted(expected)[rank::world_size]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is damaged or missing: the checkpoint was written with it")
        if (found := file_crc32(folder / name)) != expected[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum is {found:08x}, was {expected[name]:08x}")
