"""Write a manifest with a line for each clip of your films, cut inside their shots (docs/own_data.md).

    python tools/cut_clips.py --video-dir films --output clips.jsonl --num-frames 121
    python tools/preprocess_latents.py --manifest clips.jsonl --split train ...

No film is re-encoded: a line has path, start and num_frames, and the caption of the film (FILM.txt beside it, or the
column `caption` of --manifest), which may be changed clip by clip. Shots of fewer than 17 frames are left out. An index
by tools/index_shots.py is used where there is one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_text

if TYPE_CHECKING:
    from megatron_fsvideo.data.manifest import VideoEntry
    from megatron_fsvideo.data.shots import Shot


@dataclass(frozen=True)
class CutFlags(Checked):
    """which films, and how they are cut"""

    output: PathText
    """The manifest that is written."""
    num_frames: PositiveInt
    """Frames of a clip. What a shot has beyond the last whole clip is left out."""
    video_dir: PathText | None = None
    """Folder of films, with captions in .txt files. Subfolders are searched too."""
    manifest: PathText | None = None
    """JSONL, CSV or Parquet file with a film per row: path and caption."""
    shot_index: PathText | None = None
    """Folder of an index by tools/index_shots.py. None takes .shots in --video-dir, if it is there."""
    max_clips_per_shot: PositiveInt | None = None
    """Clips of one shot at most. None takes all that fit."""
    holdout_every: PositiveInt | None = None
    """Hold out every N-th shot, as pretrain_fsae.py does: its clips get the split valid, all others train."""
    overwrite: bool = False
    """Replace --output if it is there."""


@dataclass(frozen=True)
class CutJob:
    """Write a manifest with a line for each clip of your films."""

    cut: CutFlags


def cut_films(flags: CutFlags) -> None:
    """Find the shots, cut them, write the manifest."""
    from megatron_fsvideo.data.listing import INDEX_FOLDER
    from megatron_fsvideo.data.manifest import folder_entries, read_manifest_lines
    from megatron_fsvideo.data.shot_index import ShotIndex, find_all_shots
    from megatron_fsvideo.data.shots import split_shots

    if (flags.video_dir is None) == (flags.manifest is None):
        raise ValueError("give --video-dir or --manifest")
    check_outputs([flags.output], [flags.manifest] if flags.manifest else [], overwrite=flags.overwrite)
    entries = folder_entries(flags.video_dir) if flags.video_dir else read_manifest_lines(flags.manifest)
    films = {entry.path: entry for entry in entries if not entry.problem}
    if cut_before := [entry.name for entry in films.values() if entry.start is not None]:
        raise ValueError(f"{flags.manifest}: {cut_before[0]} is a clip already (it has num_frames); list whole films")
    for entry in entries:
        if entry.problem:
            print(f"skipped: {entry.problem}", file=sys.stderr)
    root = Path(flags.video_dir or Path(flags.manifest).parent)
    index = ShotIndex(root, flags.shot_index or root / INDEX_FOLDER)
    shots = find_all_shots([Path(path) for path in films], index)
    training, held_out = split_shots(shots, flags.holdout_every or 0)
    folder = Path(flags.output).parent
    lines = []
    for split, chosen in (("train", training), ("valid", held_out)):
        lines += [clip | {"split": split} for clip in cut(chosen, films, folder, flags)]
    if not lines:
        longest = max((shot.num_frames for shot in shots), default=0)
        raise ValueError(f"no shot has {flags.num_frames} frames: {len(shots)} shots, the longest has {longest}")
    write_text(flags.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    valid = sum(line["split"] == "valid" for line in lines)
    print(f"{flags.output}: {len(lines)} clips ({valid} of them valid) of {len(shots)} shots of {len(films)} films")


def main() -> None:
    """Parse the command line and cut."""
    cut_films(parse_job(CutJob).cut)


def cut(shots: Sequence[Shot], films: dict[str, VideoEntry], folder: Path, flags: CutFlags) -> list[dict]:
    """Lines of the clips that fit one after another into each shot; paths are relative to the manifest's folder."""
    lines = []
    for shot in shots:
        count = shot.num_frames // flags.num_frames
        for k in range(min(count, flags.max_clips_per_shot or count)):
            path = os.path.relpath(shot.path, folder)
            start = shot.start + k * flags.num_frames
            caption = films[shot.path].caption
            lines.append({"path": path, "caption": caption, "start": start, "num_frames": flags.num_frames})
    return lines


if __name__ == "__main__":
    run_script(main)
