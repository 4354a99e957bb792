"""Find the shots of a folder of videos once, for every later training of the autoencoder (docs/fsae.md).

    python tools/index_shots.py --video-dir videos

    torchrun --nproc-per-node 16 tools/index_shots.py --video-dir videos --shot-index indexes/videos

Any number of processes, on any number of machines (RANK and WORLD_SIZE say which videos are whose). Run it again after
a stop or with new videos: it decodes only what the index does not know.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText


@dataclass(frozen=True)
class IndexFlags(Checked):
    """what to index, and where to write"""

    video_dir: PathText
    """Folder of video and image files; subfolders are searched too."""
    shot_index: PathText | None = None
    """Folder of the index. None takes .shots in --video-dir, where training looks for it."""


@dataclass(frozen=True)
class IndexJob:
    """Find the shots of a folder of videos once."""

    index: IndexFlags


def index_shots(flags: IndexFlags) -> None:
    """Decode this process's share of the videos that the index does not know, and report."""
    from tqdm import tqdm

    from megatron_fsvideo.data.frame_files import list_clip_files
    from megatron_fsvideo.data.listing import INDEX_FOLDER
    from megatron_fsvideo.data.shot_index import ShotIndex

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(flags.shot_index or Path(flags.video_dir) / INDEX_FOLDER)
    paths = list_clip_files(flags.video_dir)
    index = ShotIndex(flags.video_dir, folder)
    mine = paths[rank::world_size]
    todo = [path for path in mine if not index.knows(path)]
    part = folder / f"{rank:05d}-of-{world_size:05d}.jsonl"
    bar = tqdm(todo, desc=f"rank {rank}", unit="video", delay=2, disable=None)
    readable = sum(index.add(path, part) for path in bar)
    print(
        f"{folder}: {len(todo)} of this process's {len(mine)} videos decoded, {len(mine) - len(todo)} were known, "
        f"{len(todo) - readable} of the decoded cannot be read",
        flush=True,
    )


def main() -> None:
    """Parse the command line and index."""
    index_shots(parse_job(IndexJob).index)


if __name__ == "__main__":
    run_script(main)
