"""The --save folder of a run: finds, names and deletes its checkpoints.

    SAVE/latest_checkpointed_iteration.txt      the newest complete checkpoint; replaced last, by rename
    SAVE/iter_0000100/job.json                  description of the run (run_record.py)
    SAVE/iter_0000100/checksums.json            checksums of all other files; written last
    SAVE/iter_0000100/...

A folder counts as a checkpoint if its name is `iter_` and an iteration of at least seven digits, and if it is whole:
it has job.json, checksums.json and every file that checksums.json names. Nothing else is loaded or deleted: a run that
is killed while it saves leaves a folder without checksums.json, and copies such as `iter_0000002_keep` are the user's.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from megatron_fsvideo.checkpoint.checksums import CHECKSUM_FILE, read_checksums
from megatron_fsvideo.data.outputs import write_text
from megatron_fsvideo.data.text_files import TextError, read_object

LATEST_FILE = "latest_checkpointed_iteration.txt"
JOB_FILE = "job.json"
_REMOVED = ".removed_"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Folder of an iteration's checkpoint."""
    return folder / f"iter_{iteration:07d}"


def whole_iterations(folder: Path) -> list[int]:
    """Iterations of all complete checkpoints of a folder, in rising order."""
    names = [path.name for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    found = [int(name.removeprefix("iter_")) for name in names if name == iteration_folder(folder, int(name[5:])).name]
    return sorted(iteration for iteration in found if is_whole(iteration_folder(folder, iteration)))


def is_whole(checkpoint: Path) -> bool:
    """Whether this folder was saved completely and no file is missing since."""
    if not (checkpoint / JOB_FILE).is_file() or not (checkpoint / CHECKSUM_FILE).is_file():
        return False
    try:
        names = read_checksums(checkpoint)
    except ValueError:
        return False
    return all((checkpoint / name).is_file() for name in names)


def latest_iteration(folder: Path) -> int | None:
    """Iteration of the newest complete checkpoint, or None if there is none.

    Raises:
        ValueError: the text file is damaged, names a folder that does not exist, or is missing beside checkpoints.
    """
    path = folder / LATEST_FILE
    if not path.exists():
        if found := whole_iterations(folder):
            raise ValueError(
                f"{folder} holds checkpoints (the newest is {iteration_folder(folder, found[-1]).name}) but no "
                f"{LATEST_FILE}, which says where a run continues: copy it too, or write {found[-1]} into it"
            )
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{path} holds {text[:40]!r} instead of an iteration")
    if not iteration_folder(folder, int(text)).is_dir():
        raise ValueError(f"{path} names iteration {text}, but {iteration_folder(folder, int(text))} does not exist")
    return int(text)


def name_unnamed_checkpoint(folder: Path) -> None:
    """Finish the first save of a run that was killed after it had completed the checkpoint, before it was named."""
    found = whole_iterations(folder)
    if found and not (folder / LATEST_FILE).exists():
        name_latest(folder, found[-1])


def name_latest(folder: Path, iteration: int) -> None:
    """Name a checkpoint the newest, from which a restarted run continues."""
    write_text(folder / LATEST_FILE, f"{iteration}\n")


def remove_old_checkpoints(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints up to `newest`; `keep` 0 deletes none."""
    if keep <= 0:
        return
    # Later checkpoints are left from a run that was restarted from an earlier checkpoint.
    saved = [iteration for iteration in whole_iterations(folder) if iteration <= newest]
    for old in saved[:-keep]:
        # Rename before deleting: a half-deleted folder would not count as a checkpoint, and nothing would remove it.
        source = iteration_folder(folder, old)
        source.rename(folder / f"{_REMOVED}{source.name}")
    for removed in folder.glob(f"{_REMOVED}iter_*"):
        shutil.rmtree(removed, ignore_errors=True)


def read_record(folder: Path, iteration: int) -> dict[str, Any]:
    """Read the job.json of a checkpoint.

    Raises:
        ValueError: job.json is missing or damaged.
    """
    path = iteration_folder(folder, iteration) / JOB_FILE
    try:
        return read_object(path)
    except TextError as error:
        raise ValueError(f"{error}: not a checkpoint of this program") from error


def describe_folder(folder: Path) -> str:
    """Describe a folder without a checkpoint, as the end of a sentence."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file"
    if (folder / JOB_FILE).is_file():
        return f"is one checkpoint of a run: name its parent, {folder.parent}"
    if (folder / "config.json").is_file():
        return "is a release or a model of another program, which has weights alone"
    if (folder / "dataset.json").is_file():
        return "is a latent dataset"
    return "holds no checkpoint"
