"""Requests for generation (image, prompt and output file), their JSONL file, and the files that a request writes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_fsvideo.config.rules import Checked, PathText, from_dict
from megatron_fsvideo.data.buckets import Bucket, choose_bucket
from megatron_fsvideo.data.outputs import check_outputs
from megatron_fsvideo.data.text_files import TextError, read_jsonl, read_text


@dataclass(frozen=True)
class _Line(Checked):
    """Types of the entries in a line of a --requests file."""

    image: PathText
    prompt: str
    out: PathText
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One clip to generate.

    Attributes:
        image: image file of the first frame.
        out: mp4 file to write.
    """

    image: str
    prompt: str
    out: str
    seed: int

    @property
    def sheet(self) -> Path:
        """The contact sheet beside the mp4."""
        return self._beside(".png")

    @property
    def record(self) -> Path:
        """The JSON record beside the mp4."""
        return self._beside(".json")

    def _beside(self, suffix: str) -> Path:
        # Only the suffix .mp4 is replaced, so that clips named v1.0 and v1.5 do not share a file.
        out = Path(self.out)
        return out.with_suffix(suffix) if out.suffix.lower() == ".mp4" else out.with_name(out.name + suffix)


def read_requests(path: str | Path, seed: int) -> list[Request]:
    """Read a JSONL file of requests. Each line is an object with image, prompt, out and optionally seed.

    Args:
        path: the file; relative paths in it are relative to its folder.
        seed: seed of requests without one.

    Raises:
        ValueError: the file or a line cannot be read, a field is missing, unknown or of another type, or there is no
            request.
    """
    folder = Path(path).parent
    requests = []
    for line, values in read_jsonl(path):
        line.checked()
        found = from_dict(_Line, values, f"{path} line {line.number}")
        chosen = seed if found.seed is None else found.seed
        requests.append(Request(str(folder / found.image), found.prompt, str(folder / found.out), chosen))
    if not requests:
        raise TextError(f"{path}: has no request; write a line with image, prompt and out for each clip")
    return requests


def check_request_files(requests: Sequence[Request], inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Refuse requests whose output would overwrite an input, another output or a file of somebody else's.

    Args:
        inputs: files that are read in addition to the images.
        overwrite: results of an earlier generation may be replaced. A picture or a JSON file that merely has the name
            of a contact sheet or a record never is.

    Raises:
        OutputError: the message names the file.
    """
    read = [*inputs, *(request.image for request in requests)]
    check_outputs(
        (path for request in requests for path in (request.out, request.sheet, request.record)), read, overwrite=True
    )
    for request in requests:
        is_ours = overwrite and _is_record(request.record, Path(request.out).name)
        check_outputs([request.out], read, overwrite=overwrite)
        check_outputs([request.sheet, request.record], read, overwrite=is_ours)


def nearest_bucket(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket in which to animate a photo: videos before images, then nearest aspect ratio, then most frames."""
    videos = [bucket for bucket in buckets if bucket.num_frames > 1] or list(buckets)
    return choose_bucket(videos, height, width, max(bucket.num_frames for bucket in videos))


def batches_of(
    requests: Sequence[Request], images: Sequence[Tensor], buckets: Sequence[Bucket], batch_size: int
) -> Iterator[tuple[Bucket, list[Request], list[Tensor]]]:
    """Group requests into batches (bucket, requests, images); each image goes to the bucket nearest to it.

    Args:
        images: uint8 [height, width, 3], one for each request.
    """
    chosen = [nearest_bucket(buckets, *image.shape[:2]) for image in images]
    for bucket in sorted(set(chosen)):
        members = [k for k, other in enumerate(chosen) if other == bucket]
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            yield bucket, [requests[k] for k in batch], [images[k] for k in batch]


def _is_record(path: Path, out: str) -> bool:
    """Whether a file is the record of an earlier generation of this mp4."""
    try:
        request = json.loads(read_text(path))["request"]
        return Path(request["out"]).name == out
    except (ValueError, KeyError, TypeError):
        return False
