"""Makes the clips that are encoded from a list of videos: shots, frame ranges, buckets, keys."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_fsvideo.data.buckets import Bucket, choose_bucket
from megatron_fsvideo.data.frame_files import open_frames
from megatron_fsvideo.data.latent_shards import hash_key
from megatron_fsvideo.data.manifest import VideoEntry
from megatron_fsvideo.data.shots import scan_shots
from megatron_fsvideo.data.video import VideoError

DIGEST_BYTES = 1 << 16
MISSING = "missing"


@dataclass(frozen=True)
class Clip:
    """Frames to encode.

    Attributes:
        start: first source frame.
        fps: rate of the clip; source frames are taken at the nearest times.
    """

    entry: VideoEntry
    start: int
    fps: float
    bucket: Bucket


@dataclass(frozen=True)
class ClipOptions:
    """Settings by which entries become clips.

    Attributes:
        buckets: shapes to choose from.
        fps: rate of the clips; None keeps the file's, thinned by `frame_stride`.
        frame_stride: source frames per clip frame, with `fps` None.
    """

    buckets: tuple[Bucket, ...]
    fps: float | None = None
    frame_stride: int = 1

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("no buckets: give at least one as frames x height x width, as in 9x96x96")
        if self.fps is not None and (self.fps <= 0 or self.frame_stride != 1):
            raise ValueError(f"fps {self.fps} must be positive and excludes frame_stride {self.frame_stride}")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride must be at least 1, got {self.frame_stride}")


def file_digest(path: str | Path) -> str:
    """Identify a file by its size and three samples of its bytes: videos are large, and names move.

    A file that cannot be opened has the digest "missing"; reading it will say why.
    """
    try:
        size = Path(path).stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with Path(path).open("rb") as file:
            for offset in (0, size // 2, max(0, size - DIGEST_BYTES)):
                file.seek(offset)
                digest.update(file.read(DIGEST_BYTES))
    except OSError:
        return "missing"
    return digest.hexdigest()[:32]


class Source:
    """The file of an entry, decoded once for its frames' times and, if the entry takes the whole file, its shots.

    Raises:
        VideoError: nothing in it can be read.
    """

    def __init__(self, entry: VideoEntry) -> None:
        self.path = entry.path
        self._shots: list[tuple[int, int]] | None = None
        table = None
        if entry.start is None:
            table, self._shots = scan_shots(entry.path)
        self.reader = open_frames(entry.path, table)

    def shots(self) -> list[tuple[int, int]]:
        """Ranges [start, end) of frames between cuts."""
        if self._shots is None:
            self._shots = scan_shots(self.path)[1]
        return self._shots


def expand(entry: VideoEntry, source: Source, options: ClipOptions) -> list[Clip]:
    """The clips of an entry: one from the start of its range, or as many as fit one after another into each shot.

    Raises:
        VideoError: no clip fits, or the range lies outside the file.
    """
    reader = source.reader
    info, timeline = reader.info, reader.timeline
    fps = options.fps or info.fps / options.frame_stride
    if entry.start is None:
        ranges = source.shots()
    else:
        ranges = [(entry.start, entry.start + (entry.num_frames or 0))]
        if entry.start < 0 or ranges[0][1] > info.num_frames:
            raise VideoError(f"{entry.name}: the file has only {info.num_frames} frames")
    clips = []
    for start, end in ranges:
        while start < end:
            bucket = choose_bucket(options.buckets, info.height, info.width, timeline.fitting(start, end, fps))
            if bucket is None:
                break
            clips.append(Clip(entry, start, fps, bucket))
            start = end if entry.start is not None else timeline.clip_indices(start, bucket.num_frames, fps)[-1] + 1
    if not ranges:
        raise VideoError(f"{entry.name}: all of its {info.num_frames} frames are dark or damaged")
    if not clips:
        start, end = max(ranges, key=lambda chosen: chosen[1] - chosen[0])
        least = min(bucket.num_frames for bucket in options.buckets)
        raise VideoError(
            f"{entry.name}: {end - start} frames make {timeline.fitting(start, end, fps)} at {fps:g} frames per "
            f"second, the shortest bucket has {least}"
        )
    return clips


def latent_key(clip: Clip, digest: str, fingerprint: str) -> str:
    """Hash of what the latents depend on: source, clip range, bucket, frames, rate, the autoencoder's weights."""
    return hash_key("latent", digest, clip.start, clip.bucket, f"{clip.fps:.6f}", fingerprint)


def text_key(caption: str, encoder: str, max_length: int) -> str:
    """Hash of what a text embedding depends on."""
    return hash_key("text", caption, encoder, max_length)


def image_key(clip: Clip, digest: str, encoder: str) -> str:
    """Hash of what the first frame's embedding depends on."""
    return hash_key("image", digest, clip.start, clip.bucket.height, clip.bucket.width, encoder)
