"""Which files of a folder count, for videos, images and weights alike.

- Names that begin with a dot (`.DS_Store`, macOS's `._clip.mp4`) or are an editor's (`clip.mp4~`, `#clip.mp4#`) do not.
- Sub-folders do, in the order of their names.
- Links are followed once: a link to something that the folder holds anyway does not count a second time.
- What was left out is said in one line of the log.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors",)
# Files that stand beside others on purpose are not worth a word.
_COMPANIONS = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".md", ".srt", ".vtt")
INDEX_FOLDER = ".shots"
"""The shot index of a folder of videos, if no other is named (shot_index.py): nothing that was left out."""
_SHOWN = 3


@dataclass
class _Ignored:
    """Maps each reason for leaving files out to their names."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        self.names.setdefault(reason, []).append(path.name)

    def sentence(self) -> str:
        parts = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:_SHOWN])}{more})")
        return "; ".join(parts)


def list_videos(folder: str | Path) -> list[Path]:
    """All video files below a folder, sorted by path.

    Raises:
        ValueError: the folder is missing or has no video file.
    """
    return list_files(folder, VIDEO_SUFFIXES, "video")


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by path.

    Raises:
        ValueError: the folder is missing or has no image file.
    """
    return list_files(folder, IMAGE_SUFFIXES, "image")


def list_files(folder: str | Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """All files below a folder that count and end with one of `suffixes`, sorted by path.

    Args:
        what: what such a file is, for messages.

    Raises:
        ValueError: the folder is missing or has no such file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder of {what}s")
    ignored, others = _Ignored(), Counter[str]()
    found = []
    for path in _walk(root, root.resolve(), {_identity(root)}, ignored):
        suffix = path.suffix.lower()
        if suffix in suffixes:
            found.append(path)
        elif suffix not in _COMPANIONS:
            others[suffix or "no ending"] += 1
    said = [ignored.sentence()] if ignored.names else []
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        said.append(f"{others.total()} of other types ({kinds})")
    if not found:
        left_out = f"; left out: {'; '.join(said)}" if said else ""
        raise ValueError(f"no {what} file below {folder} (looked for {' '.join(suffixes)}{left_out})")
    if said:
        logger.warning("%s: %d %s files; left out: %s", folder, len(found), what, "; ".join(said))
    return sorted(found)


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder itself, without sub-folders, that count and end with `suffix`, sorted."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not is_hidden(path.name) and path.is_file())


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden file or of an editor's copy."""
    return name.startswith(".") or name.endswith("~") or (name.startswith("#") and name.endswith("#"))


def _walk(folder: Path, root: Path, visited: set[tuple[int, int]], ignored: _Ignored) -> Iterator[Path]:
    """Files below a folder.

    Args:
        root: the folder where the walk began, without links.
        visited: folders that were walked; a link may lead back to one.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error.strerror}") from error
    for entry in entries:
        path = folder / entry.name
        if entry.name == INDEX_FOLDER:
            continue
        if is_hidden(entry.name):
            ignored.add("hidden or an editor's copies", path)
        elif entry.is_symlink() and not path.exists():
            ignored.add("links that lead nowhere", path)
        elif entry.is_symlink() and path.resolve().is_relative_to(root):
            ignored.add("links within the folder", path)
        elif not entry.is_dir():
            yield path
        elif (place := _identity(path)) not in visited:
            visited.add(place)
            yield from _walk(path, root, visited, ignored)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
