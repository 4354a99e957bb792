"""Make short captioned clips for the quickstart's DiT: camera moves over stills of real films, and real motion.

    python examples/quickstart/make_pans.py --video-dir runs/quickstart/videos --output-dir runs/quickstart/pans

Arbitrary motion cannot be learnt in minutes; a camera move can, and "pan left" says which. A window
is moved over a still by a quarter of its side; "pans to the left" moves the window to the left. Stills for training
come from training shots, stills for the evaluation from held-out shots, split as the autoencoder's training splits
them. Each held-out first frame is used for all four moves.

Writes `manifest.jsonl` (path, start, num_frames, caption, direction, source, split; splits `train` and `heldout`) and
films of many clips one after another, nearly lossless: one file per clip would cost more than the encoding.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_fsvideo.config import FSAE_PRESETS, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.listing import list_videos
from megatron_fsvideo.data.outputs import write_text
from megatron_fsvideo.data.shots import Shot, find_shots, split_shots
from megatron_fsvideo.data.video import VideoReader, resize_and_crop, resize_short_side, write_video

# Rows and columns that the window moves by, in units of the travel.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CAPTIONS = {
    # Short captions: in a sentence of nine tokens that differs in one word, the word is learnt much later.
    "left": "pan left",
    "right": "pan right",
    "up": "pan up",
    "down": "pan down",
    "real": "a film scene",
}
# Side of the window as a share of the still's short side. Held-out windows need room on all four sides.
WINDOW = {"train": (0.45, 0.7), "heldout": (0.45, 0.62)}
CLIPS_PER_FILE = 64
# Frames beside a cut may be blended with the other shot by the codec or a dissolve.
MARGIN = 4
# Number of places tried for a held-out window.
PLACES = 8
# Number of frames decoded at once; full-size frames are large.
CHUNK = 32


@dataclass(frozen=True)
class PanFlags(Checked):
    """what to make"""

    video_dir: PathText = "runs/quickstart/videos"
    """Folder of films."""
    output_dir: PathText = "runs/quickstart/pans"
    """Folder for the clips and manifest.jsonl."""
    train_clips: Count = 1200
    """Number of pans over stills of training shots."""
    real_clips: Count = 120
    """Number of clips with real motion from training shots."""
    heldout_frames: Count = 8
    """Number of first frames from held-out shots. Each gives four clips, one per direction."""
    holdout_every: PositiveInt = FSAE_PRESETS["fsae_quickstart"]["holdout_every"]
    """Hold out every n-th shot of each film. The autoencoder's training must hold out the same shots."""
    bucket: PathText = "9x80x80"
    """Shape of the clips, frames x height x width."""
    travel: Count = 20
    """Distance in pixels that the window moves from the first to the last frame."""
    still_interval: PositiveInt = 7
    """Frames between stills."""
    seed: Count = 0
    """Seed of all random choices."""


@dataclass(frozen=True)
class PanJob:
    """Make captioned camera pans over stills of real films."""

    pans: PanFlags = field(default_factory=PanFlags)


@dataclass(frozen=True)
class Still:
    """A frame uint8 [h, w, 3] and its origin."""

    image: torch.Tensor
    source: str


@dataclass(frozen=True)
class PanClip:
    """Frames uint8 [f, h, w, 3] and their manifest fields."""

    frames: torch.Tensor
    direction: str
    source: str


def main() -> None:
    """Find shots, take stills, write the clips and the manifest."""
    flags = parse_job(PanJob).pans
    bucket = Bucket.parse(flags.bucket)
    shots = [shot for path in list_videos(flags.video_dir) for shot in find_shots(path)]
    splits = dict(zip(("train", "heldout"), split_shots(shots, flags.holdout_every), strict=True))
    lines: list[dict[str, object]] = []
    for split, members in splits.items():
        if not members:
            raise ValueError(f"{flags.video_dir}: {len(shots)} shots, none of them for {split}; see --holdout-every")
        frames = load_shots(members, bucket)
        stills = [Still(image, name) for name, images in frames.items() for image in images[:: flags.still_interval]]
        rng = np.random.default_rng([flags.seed, len(lines)])
        if split == "train":
            clips = [*train_pans(stills, bucket, flags, rng), *real_clips(frames, bucket, flags.real_clips, rng)]
        else:
            clips = list(heldout_pans(stills, bucket, flags, rng))
        lines += write_clips(Path(flags.output_dir), split, clips)
        print(f"{split}: {len(members)} shots, {len(stills)} stills, {len(clips)} clips")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(Path(flags.output_dir) / "manifest.jsonl", text)


def load_shot(shot: Shot, reader: VideoReader, short_side: int) -> torch.Tensor:
    """Load all frames uint8 [f, h, w, 3] of a shot except those next to its ends, scaled down."""
    parts = []
    for start in range(shot.start + MARGIN, shot.end - MARGIN, CHUNK):
        parts.append(reader.read(start, min(CHUNK, shot.end - MARGIN - start), short_side=short_side))
    return torch.cat(parts)


def load_shots(shots: list[Shot], bucket: Bucket) -> dict[str, torch.Tensor]:
    """Map each shot's name to its frames, at the size of the smallest window. Each film is decoded once."""
    short_side = int(np.ceil(max(bucket.height, bucket.width) / WINDOW["train"][0]))
    loaded = {}
    for path in dict.fromkeys(shot.path for shot in shots):
        with VideoReader(path) as reader:
            loaded |= {shot.name: load_shot(shot, reader, short_side) for shot in shots if shot.path == path}
    return loaded


def train_pans(stills: list[Still], bucket: Bucket, flags: PanFlags, rng: np.random.Generator) -> Iterator[PanClip]:
    """Make pans of random direction, place, size and mirroring, with equally many in each direction."""
    for index in range(flags.train_clips):
        direction = list(DIRECTIONS)[index % len(DIRECTIONS)]
        still = stills[rng.integers(len(stills))]
        # The still is mirrored before the move, so that left stays left.
        image = still.image.flip(1) if rng.random() < 0.5 else still.image
        image = _scaled(image, bucket, rng.uniform(*WINDOW["train"]))
        moves = [flags.travel * step for step in DIRECTIONS[direction]]
        start = [
            rng.integers(max(0, -move), side - length - max(0, move) + 1)
            for move, side, length in zip(moves, image.shape[:2], (bucket.height, bucket.width), strict=True)
        ]
        yield PanClip(pan(image, bucket, start, moves), direction, still.source)


def heldout_pans(stills: list[Still], bucket: Bucket, flags: PanFlags, rng: np.random.Generator) -> Iterator[PanClip]:
    """Make all four moves from each of a few first frames, taken evenly from all held-out stills.

    Of several places in a still, the one with most detail is used, because a move over plain sky cannot be seen.
    """
    for index in np.linspace(0, len(stills) - 1, flags.heldout_frames).round().astype(int):
        still = stills[index]
        image = _scaled(still.image, bucket, rng.uniform(*WINDOW["heldout"]))
        places = [
            [
                int(rng.integers(flags.travel, side - length - flags.travel + 1))
                for side, length in zip(image.shape[:2], (bucket.height, bucket.width), strict=True)
            ]
            for _ in range(PLACES)
        ]
        start = max(places, key=lambda place: detail(pan(image, bucket, place, [0, 0])[0]))
        for direction, steps in DIRECTIONS.items():
            moves = [flags.travel * step for step in steps]
            yield PanClip(pan(image, bucket, start, moves), direction, still.source)


def pan(image: torch.Tensor, bucket: Bucket, start: list[int], moves: list[int]) -> torch.Tensor:
    """Windows uint8 [f, h, w, 3] of an image, the first with its corner at `start`, the last at `start + moves`."""
    windows = []
    for k in range(bucket.num_frames):
        top, left = (
            int(begin + round(move * k / (bucket.num_frames - 1))) for begin, move in zip(start, moves, strict=True)
        )
        windows.append(image[top : top + bucket.height, left : left + bucket.width])
    return torch.stack(windows)


def detail(image: torch.Tensor) -> float:
    """Mean change of an image uint8 [h, w, 3] between neighbouring pixels, along the axis with less change."""
    values = image.float().mean(2)
    return min(values.diff(dim=axis).abs().mean().item() for axis in (0, 1))


def real_clips(
    shots: dict[str, torch.Tensor], bucket: Bucket, count: int, rng: np.random.Generator
) -> Iterator[PanClip]:
    """Cut clips from the films, every second frame, at random places in training shots."""
    span = 2 * (bucket.num_frames - 1) + 1
    names = [name for name, frames in shots.items() if len(frames) >= span]
    places = np.array([len(shots[name]) - span + 1 for name in names])
    for k in rng.choice(len(names), count, p=places / places.sum()):
        start = int(rng.integers(places[k]))
        frames = shots[names[k]][start : start + span : 2]
        yield PanClip(resize_and_crop(frames, bucket.height, bucket.width), "real", names[k])


def write_clips(folder: Path, split: str, clips: list[PanClip]) -> Iterator[dict[str, object]]:
    """Write clips, many to a film, and return their manifest lines."""
    for number, begin in enumerate(range(0, len(clips), CLIPS_PER_FILE)):
        group = clips[begin : begin + CLIPS_PER_FILE]
        path = f"{split}-{number:03d}.mp4"
        length = len(group[0].frames)
        film = torch.cat([clip.frames for clip in group])
        write_video(folder / path, film, fps=8, quality=6, full_color=True, keyframe_interval=length)
        for k, clip in enumerate(group):
            yield {
                "path": path,
                "start": k * length,
                "num_frames": length,
                "caption": CAPTIONS[clip.direction],
                "direction": clip.direction,
                "source": clip.source,
                "split": split,
            }


def _scaled(image: torch.Tensor, bucket: Bucket, window: float) -> torch.Tensor:
    """Scale an image so that `window` of its short side has the clip's larger side."""
    return resize_short_side(image[None], round(max(bucket.height, bucket.width) / window))[0]


if __name__ == "__main__":
    run_script(main)
