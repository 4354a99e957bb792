"""Index of the video files of a folder: their frames' times and their shots. Indexed files are not decoded again.

An index is a folder of JSONL files, one line for each video, made by `tools/index_shots.py` on any number of processes;
each process appends to a file of its own. A line counts for a file of the same name, size and time of change, or of
the same digest. A line that a killed process left half written is ignored. Files that the index does not know are
decoded when they are asked for, and remembered as long as this process lives.
"""

import base64
import os
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote_from_bytes

import msgspec
import numpy as np
from tqdm import tqdm

from megatron_fsvideo.data.clips import file_digest
from megatron_fsvideo.data.frame_files import ImageReader, is_image, open_frames
from megatron_fsvideo.data.shots import MIN_SHOT_FRAMES, Shot, scan_shots
from megatron_fsvideo.data.video import FrameTable, VideoError, VideoInfo, VideoReader
from megatron_fsvideo.data.video.frame_table import PROGRESS_AFTER

VERSION = 1
WORTH_INDEXING = 200
"""Files from which on a user is told of the tool."""


class IndexLine(msgspec.Struct):
    """One video of an index: identity, table and shots; or why it cannot be read."""

    version: int
    path: str
    size: int
    mtime_ns: int
    digest: str
    error: str = ""
    num_frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    time_base: tuple[int, int] = (1, 1)
    times: str = ""
    marks: str = ""
    damaged: tuple[int, ...] = ()
    is_sound: bool = True
    is_interlaced: bool = False
    shots: tuple[tuple[int, int], ...] = ()

    def table(self) -> FrameTable:
        """The file's table."""
        steps = np.frombuffer(zlib.decompress(base64.b64decode(self.times)), "<i8")
        return FrameTable(
            VideoInfo(self.num_frames, self.height, self.width, self.fps),
            np.cumsum(steps) if len(steps) else None,
            Fraction(*self.time_base),
            np.frombuffer(base64.b64decode(self.marks), "<u4"),
            self.damaged,
            self.is_sound,
            self.is_interlaced,
        )


class ShotIndex:
    """The videos below a folder.

    Args:
        root: the folder that the index's names are relative to.
        folder: the index; None, or a folder that is not there, knows nothing.
    """

    def __init__(self, root: str | Path, folder: str | Path | None = None) -> None:
        self._root = Path(root)
        self._lines: dict[str, IndexLine] = {}
        self._read(None if folder is None else Path(folder))

    def knows(self, path: str | Path) -> bool:
        """Whether the index has a valid line of this file, so that it need not be decoded."""
        line = self._lines.get(self._name(path))
        return line is not None and _is_of(line, Path(path))

    def line(self, path: str | Path) -> IndexLine:
        """Return the line of a file. The file is decoded if the index does not know it."""
        if not self.knows(path):
            self.remember(self._scan(Path(path)))
        return self._lines[self._name(path)]

    def remember(self, line: IndexLine) -> None:
        """Add a line that another process made."""
        self._lines[line.path] = line

    def shots(self, path: str | Path, min_frames: int = MIN_SHOT_FRAMES) -> list[Shot]:
        """The shots of a file with at least `min_frames` frames, in order; of an image, its one frame.

        Raises:
            VideoError: the file cannot be read.
        """
        ranges = self._readable(path).shots
        least = 1 if is_image(path) else min_frames
        return [Shot(str(path), start, end - start) for start, end in ranges if end - start >= least]

    def info(self, path: str | Path) -> VideoInfo:
        """A file's measures.

        Raises:
            VideoError: the file cannot be read.
        """
        line = self._readable(path)
        return VideoInfo(line.num_frames, line.height, line.width, line.fps)

    def open(self, path: str | Path) -> VideoReader | ImageReader:
        """A reader that need not measure the file; it opens the file when it reads.

        Raises:
            VideoError: the file cannot be read.
        """
        return open_frames(path, self._readable(path).table())

    def add(self, path: str | Path, part: Path) -> bool:
        """Decode a file and append what is found to `part`; whether it can be read."""
        line = self._scan(Path(path))
        self.remember(line)
        part.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(part, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            # A line that a killed process left half written must not swallow this one.
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, b"\n" * torn + msgspec.json.encode(line) + b"\n")
        finally:
            os.close(handle)
        return not line.error

    def _read(self, folder: Path | None) -> None:
        if folder is None or not folder.is_dir():
            return
        unreadable = 0
        for part in sorted(folder.glob("*.jsonl")):
            with part.open("rb") as file:
                for text in file:
                    try:
                        line = msgspec.json.decode(text, type=IndexLine)
                    except (msgspec.MsgspecError, UnicodeDecodeError):
                        unreadable += 1
                        continue
                    if line.version == VERSION:
                        self.remember(line)
        if unreadable:
            print(f"note: {folder}: {unreadable} unreadable lines; their videos are decoded again", file=sys.stderr)

    def _readable(self, path: str | Path) -> IndexLine:
        line = self.line(path)
        if line.error:
            raise VideoError(line.error)
        return line

    def _scan(self, path: Path) -> IndexLine:
        try:
            status = path.stat()
            identity = (VERSION, self._name(path), status.st_size, status.st_mtime_ns, file_digest(path))
        except OSError as error:
            return IndexLine(VERSION, self._name(path), 0, 0, "", error=f"{path}: {error.strerror}")
        try:
            table, shots = scan_shots(path)
        except VideoError as error:
            return IndexLine(*identity, error=str(error))
        steps = np.empty(0, "<i8") if table.times is None else np.diff(table.times, prepend=0).astype("<i8")
        return IndexLine(
            *identity,
            "",
            table.info.num_frames,
            table.info.height,
            table.info.width,
            table.info.fps,
            (table.time_base.numerator, table.time_base.denominator),
            base64.b64encode(zlib.compress(steps.tobytes())).decode(),
            base64.b64encode(table.marks.astype("<u4").tobytes()).decode(),
            table.damaged,
            table.is_sound,
            table.is_interlaced,
            tuple(shots),
        )

    def _name(self, path: str | Path) -> str:
        """Relative to the root, spelled so that any bytes of a file name are ASCII."""
        return quote_from_bytes(os.fsencode(os.path.relpath(path, self._root)), safe=b"/ !#$&'()+,;=@[]{}~")


def find_all_shots(paths: Sequence[Path], index: ShotIndex) -> list[Shot]:
    """The shots of all files. Files that cannot be read are named on stderr and skipped."""
    unknown = [path for path in paths if not index.knows(path)]
    if len(unknown) >= WORTH_INDEXING:
        print(
            f"note: {len(unknown)} of {len(paths)} videos are decoded to find their shots, by each process and at each "
            "start; tools/index_shots.py does it once",
            file=sys.stderr,
            flush=True,
        )
    shots: list[Shot] = []
    for path in tqdm(paths, desc="shots", unit="video", delay=PROGRESS_AFTER, disable=None):
        try:
            shots.extend(index.shots(path))
        except VideoError as error:
            print(f"skipped a damaged video: {error}", file=sys.stderr, flush=True)
    return shots


def _is_of(line: IndexLine, path: Path) -> bool:
    try:
        status = path.stat()
        if status.st_size != line.size:
            return False
        return status.st_mtime_ns == line.mtime_ns or file_digest(path) == line.digest
    except OSError:
        return False
