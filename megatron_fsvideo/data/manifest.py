"""Lists of videos with captions: JSONL, CSV or Parquet files, and folders with a .txt beside each video.

What is wrong with one entry alone (a caption in another encoding, a file name that is no text) marks that entry, which
is skipped, counted and named when its turn comes. What is wrong with the list is refused.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from megatron_fsvideo.config import require
from megatron_fsvideo.data.frame_files import list_clip_files
from megatron_fsvideo.data.schema import checked
from megatron_fsvideo.data.text_files import (
    HalfPairError,
    TextError,
    is_unicode,
    one_line,
    parse_json,
    printable,
    read_lines,
    read_text,
)

# Names that other data sets have for our columns; the first that a row has is taken.
COLUMNS = {
    "path": ("path", "video_path", "video", "file_path", "file_name", "filename", "file", "videos"),
    "caption": ("caption", "text", "prompt", "description", "captions"),
    "start": ("start", "start_frame"),
    "num_frames": ("num_frames",),
    "split": ("split",),
}
MAX_FRAMES = 2**31


@dataclass(frozen=True)
class VideoEntry:
    """One line of a manifest, or one file of a folder.

    Attributes:
        path: the file.
        source: its name as the list spells it (relative): what reports and shards say.
        caption: may be empty when no text encoder is used.
        start, num_frames: the frames to take; both None takes the whole file, cut at its shots.
        problem: why this entry cannot be used, or empty.
    """

    path: str
    source: str
    caption: str
    start: int | None = None
    num_frames: int | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """Source and range, for messages."""
        if self.start is None:
            return self.source
        return f"{self.source}:{self.start}-{self.start + (self.num_frames or 0)}"


class _Row(msgspec.Struct):
    """The columns of a row that mean something here; others are ignored."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    caption: str | None = None
    start: Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAMES)] | None = None
    num_frames: Annotated[int, msgspec.Meta(ge=1, le=MAX_FRAMES)] | None = None
    split: str | None = None


def read_manifest_lines(path: str | Path, split: str | None = None) -> list[VideoEntry]:
    """Read a manifest: JSONL, CSV or Parquet by its ending, with `path`, `caption` and optionally a range of frames.

    Args:
        path: the manifest; relative video paths are relative to its folder.
        split: take only the rows whose `split` is this.

    Raises:
        ValueError: missing, empty, or a row that is not like that, with its number.
        ImportError: a Parquet file without pyarrow.
    """
    if not Path(path).is_file():
        raise ValueError(f"manifest {path} does not exist")
    entries = []
    for where, row in _rows(Path(path)):
        if isinstance(row, str):
            entries.append(VideoEntry("", where, "", problem=row))
            continue
        values = checked(
            where, _Row, _our_columns(where, row), from_strings=Path(path).suffix.lower() in (".csv", ".tsv")
        )
        if split is None or values.split == split:
            entries.append(_entry(where, Path(path).parent, values))
    if not entries:
        raise ValueError(f"{path} has no line" + (f" with split {split!r}" if split is not None else ""))
    return entries


def folder_entries(folder: str | Path) -> list[VideoEntry]:
    """All videos and images below a folder; the caption of `a.mp4` is the text of `a.txt` beside it, if any."""
    entries = []
    for path in list_clip_files(folder):
        source, text = str(path.relative_to(folder)), path.with_suffix(".txt")
        if not is_unicode(source):
            entries.append(_unusable(source, f"{path}: the file name is not UTF-8; rename the file"))
            continue
        try:
            caption = one_line(read_text(text)) if text.is_file() else ""
            entries.append(VideoEntry(str(path), source, caption))
        except TextError as error:
            entries.append(_unusable(source, f"the caption of {path}: {error}"))
    return entries


def require_captions(entries: Sequence[VideoEntry]) -> None:
    """Refuse entries without text.

    Raises:
        ValueError: how many, and the first.
    """
    if missing := [entry.name for entry in entries if not entry.caption and not entry.problem]:
        raise ValueError(
            f"{len(missing)} of {len(entries)} videos have no caption, the first is {missing[0]}: put it into the "
            "manifest's caption or a .txt beside the video, or run with --text-encoder none"
        )


def _entry(where: str, folder: Path, row: _Row) -> VideoEntry:
    if row.start is not None and row.num_frames is None:
        raise TextError(f"{where}: has start but no num_frames")
    start = 0 if row.num_frames is not None and row.start is None else row.start
    for name, text in (("path", row.path), ("caption", row.caption or "")):
        if not is_unicode(text):
            return _unusable(where, f"{where}: {name} {printable(text)[:60]!r} holds half of a surrogate pair")
    if "\0" in row.path:
        return _unusable(where, f"{where}: path {row.path!r} holds a zero byte")
    return VideoEntry(str(folder / row.path), row.path, (row.caption or "").strip(), start, row.num_frames)


def _unusable(source: str, problem: str) -> VideoEntry:
    return VideoEntry("", printable(source), "", problem=printable(problem))


def _our_columns(where: str, row: Any) -> dict[str, Any]:
    """A row under our names, without the columns that mean nothing here and without empty ones."""
    if not isinstance(row, dict):
        raise TextError(f"{where}: not a JSON object with a path ({type(row).__name__})")
    found = {}
    for name, spellings in COLUMNS.items():
        given = [row[spelling] for spelling in spellings if row.get(spelling) not in (None, "")]
        found |= {name: given[0]} if given else {}
    if "path" not in found:
        raise TextError(f"{where}: has no path; the column may be called {', '.join(COLUMNS['path'])}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row), or (where, problem) of a line that cannot be decoded."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    else:
        for line in read_lines(path):
            where = f"{path} line {line.number}"
            if line.text is None:
                yield where, line.problem
            elif line.text.strip():
                try:
                    yield where, parse_json(line.text, where)
                except HalfPairError as error:
                    yield where, str(error)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    # A caption may hold newlines, so lines that are not UTF-8 are marked inside the text and found again in their row.
    lines = read_lines(path)
    text = "\n".join(line.text if line.text is not None else f"\ud800{k}\ud800" for k, line in enumerate(lines))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(reader, start=2):
            where = f"{path} row {number}"
            if None in row or None in row.values():
                found = next((v for v in row.values() if isinstance(v, str) and v.startswith("\ud800")), None)
                if found is None:
                    raise TextError(f"{where}: has another number of columns than the first row")
                yield where, lines[int(found.strip("\ud800"))].problem
            else:
                yield where, row
    except csv.Error as error:
        raise TextError(f"{path} line {reader.line_num}: is not CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = require("pyarrow.parquet", "parquet")
    arrow = require("pyarrow", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for spellings in COLUMNS.values() for name in spellings if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: is not a Parquet file that can be read: {one_line(str(error))[:200]}") from None
