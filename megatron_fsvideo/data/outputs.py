"""Output files: tried before the work starts, never written over something else, whole or absent.

Every tool calls `check_outputs` before it loads a model, and writes through `replacing` or one of the functions below
it. A file appears by rename from a temporary file in its own folder, with the permissions that the user's umask says.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the system's error numbers mean for somebody who waits for a result.
_CAUSES = {
    errno.ENOSPC: "there is no space left on the device; make room or choose another folder",
    errno.EDQUOT: "the disk quota is used up; make room or choose another folder",
    errno.EACCES: "it is not permitted; change the folder's permissions or choose another folder",
    errno.EPERM: "it is not permitted; change the folder's permissions or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "a part of its path is a file, not a folder",
    errno.ENOENT: "its folder does not exist or has been removed",
    errno.EIO: "the device reports an error; choose another one",
    errno.EFBIG: "the file is larger than the file system or the limits of this process allow",
}


class OutputError(ValueError):
    """An output that cannot be written or would destroy something. The message is one line that names the file."""


def check_outputs(
    outputs: Iterable[str | Path],
    inputs: Iterable[str | Path] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Refuse outputs that would destroy something, then try each one by creating a file beside it.

    Args:
        outputs: every file that the program will write.
        inputs: every file that it reads.
        overwrite: existing outputs may be replaced; inputs never.

    Raises:
        OutputError: an output is also an input or another output, is there already, is a folder or a device, or its
            folder cannot be written to.
    """
    read = {_place(path): path for path in inputs}
    written: dict[tuple[int, int] | Path, str | Path] = {}
    for output in outputs:
        place = _place(output)
        if place in read:
            raise OutputError(f"{output}: is both read ({read[place]}) and written; choose another output")
        if place in written:
            raise OutputError(f"{output}: would be written twice (the other is {written[place]}); choose another name")
        written[place] = output
        try:
            if os.path.lexists(output):
                _check_existing(Path(output), overwrite)
        except OSError as error:
            raise OutputError(_sentence(output, error)) from error
    for output in written.values():
        try_output(output)


def try_output(path: str | Path) -> None:
    """Create a file in the folder of an output, or where that folder would be made, and remove it again.

    Raises:
        OutputError: with the cause: no space, not permitted, read-only, quota, a name that is too long.
    """
    try:
        target = _target(path)
        _try_name(target)
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
        temporary = _temporary(folder / target.name)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OutputError(_sentence(path, error)) from error


def try_folder(folder: str | Path) -> None:
    """Create a file in an output folder, or where it would be made, and remove it again.

    Raises:
        OutputError: nothing can be written there; the message names the cause.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise OutputError(f"{folder}: is a file; name a folder")
    try:
        try_output(Path(folder) / "x")
    except OutputError as error:
        raise OutputError(_sentence(folder, error.__cause__)) from error.__cause__


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the output's folder; when the block ends well, that file takes the output's place.

    Raises:
        OutputError: it cannot be written; the message says why. Nothing is left behind.
    """
    temporary: Path | None = None
    try:
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        yield temporary
        _flush(temporary)
        temporary.replace(target)
    except OSError as error:
        # An error of a file that the block reads is not the output's.
        name = None if error.filename is None else os.fsdecode(error.filename).removeprefix("file:")
        if name is not None and Path(name).parent != _target(path).parent:
            raise
        raise OutputError(_sentence(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Half of a surrogate pair is written as `?`.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _check_existing(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; name a file")
    if output.exists() and not output.is_file():
        raise OutputError(f"{output}: is not a regular file; choose another output")
    if not overwrite:
        raise OutputError(f"{output}: is there already; choose another name, or give --overwrite to replace it")


def _place(path: str | Path) -> tuple[int, int] | Path:
    """Identity of a file, equal for all its spellings, links and hard links."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return _target(path)


def _target(path: str | Path) -> Path:
    """The file itself where the path is a link, which stays a link."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        return Path(os.path.abspath(path))


def _temporary(target: Path) -> Path:
    """A short hidden name: that of the target may already be as long as names can be."""
    return target.parent / f".{os.getpid()}.{secrets.token_hex(6)}.tmp"


def _try_name(target: Path) -> None:
    """Ask the file system about a name, which may be what it refuses.

    Raises:
        OSError: the name is too long.
    """
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass


def _flush(path: Path) -> None:
    """Bring a file's content to the device, so that a power cut leaves the old or the new file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sentence(path: str | Path, error: BaseException | None) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return f"{path}: cannot be written: {_CAUSES.get(number, str(error))}"
