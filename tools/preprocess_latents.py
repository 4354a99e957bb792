"""Encode videos to a latent dataset, once, for DiT training (docs/data_format.md).

    python tools/preprocess_latents.py --manifest clips.jsonl --fsae runs/fsae --text-encoder minilm \
        --buckets 9x80x80 --output data/latents

    torchrun --nproc-per-node 8 tools/preprocess_latents.py --video-dir videos --fsae fsae_release \
        --text-encoder umt5:google/umt5-xxl --image-encoder clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K \
        --allow-download --buckets 121x704x1280 121x1280x704 --fps 24 --output data/latents

Any number of processes; run it again after a stop, and it goes on. A second run with new captions encodes only text.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText, Positive, PositiveInt, Share
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.outputs import try_folder

if TYPE_CHECKING:
    from megatron_fsvideo.data.manifest import VideoEntry
    from megatron_fsvideo.data.preprocessing import Encoders


@dataclass(frozen=True)
class SourceFlags(Checked):
    """which videos"""

    manifest: PathText | None = None
    """JSONL, CSV or Parquet file with one clip per row: path, caption and optionally start, num_frames and split."""
    split: PathText | None = None
    """Take only lines of the manifest with this split."""
    video_dir: PathText | None = None
    """Folder of videos, with captions in .txt files. Subfolders are searched too. Videos are cut into clips within
    shots."""


@dataclass(frozen=True)
class EncodeFlags(Checked):
    """what encodes them, and to what"""

    fsae: PathText
    """Autoencoder: a release folder, or a --save folder of pretrain_fsae.py."""
    output: PathText
    """Folder of the dataset. An unfinished or earlier dataset is continued."""
    buckets: tuple[PathText, ...]
    """Clip shapes, frames x height x width, such as 9x96x96. A video takes the shape with the nearest aspect ratio."""
    text_encoder: PathText = "none"
    """Text encoder: umt5:PATH_OR_HUB_ID, minilm or none."""
    image_encoder: PathText = "none"
    """Image encoder: clip:PATH_OR_HUB_ID, efficientnet-lite0 or none."""
    allow_download: bool = False
    """Take encoders from the Hugging Face hub if no folder has their name."""
    text_max_length: PositiveInt | None = None
    """Number of tokens of a text embedding. None takes the encoder's usual number."""
    negative_prompt: str = "blurry, low quality, distorted, jittery, static"
    """Negative prompt for guidance at generation, which is stored encoded."""
    fps: Positive | None = None
    """Frames per second of the clips. None keeps each video's own rate."""
    frame_stride: PositiveInt = 1
    """Step between source frames, if --fps is not given."""


@dataclass(frozen=True)
class WorkFlags(Checked):
    """how the work is done"""

    encode_batch_size: PositiveInt = 8
    """Number of clips that are encoded together."""
    samples_per_shard: PositiveInt = 256
    """Clips per shard. A restart repeats at most the unfinished shards."""
    max_bad_fraction: Share = 0.01
    """Largest share of unreadable videos. They are skipped and named; a larger share stops the run, if it is more than
    one video. 0 allows none."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the autoencoder, and on a GPU also of the other encoders."""
    device: PathText | None = None
    """Device, such as cpu or cuda. None takes the GPU of this process, if there is one."""


@dataclass(frozen=True)
class PreprocessJob:
    """Encode videos to a latent dataset."""

    encode: EncodeFlags
    source: SourceFlags = field(default_factory=SourceFlags)
    work: WorkFlags = field(default_factory=WorkFlags)


def run(job: PreprocessJob) -> None:
    """Load the encoders and encode this process's share."""
    from megatron_fsvideo.data.clips import ClipOptions
    from megatron_fsvideo.data.manifest import require_captions
    from megatron_fsvideo.data.preprocessing import PreprocessOptions, preprocess

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO, format=f"[rank {rank}] %(message)s")
    # All refusals that need no model come before a model is loaded.
    buckets = tuple(Bucket.parse(text) for text in job.encode.buckets)
    clips = ClipOptions(buckets, job.encode.fps, job.encode.frame_stride)
    try_folder(job.encode.output)
    entries = _entries(job.source)
    if job.encode.text_encoder != "none":
        require_captions(entries)
    options = PreprocessOptions(
        clips,
        job.work.encode_batch_size,
        job.work.samples_per_shard,
        job.work.max_bad_fraction,
        job.encode.negative_prompt,
    )
    encoders = _load_encoders(job)
    done = preprocess(Path(job.encode.output), entries, encoders, options, rank, world_size)
    logging.info("%s: %s", job.encode.output, "complete" if done else "this process is done, others still work")


def main() -> None:
    """Parse the command line and encode."""
    run(parse_job(PreprocessJob))


def _entries(source: SourceFlags) -> list[VideoEntry]:
    from megatron_fsvideo.data.manifest import folder_entries, read_manifest_lines

    if source.manifest is None and source.video_dir is None:
        raise ValueError("nothing to encode: give --manifest or --video-dir")
    entries = [] if source.manifest is None else read_manifest_lines(source.manifest, source.split)
    return entries + ([] if source.video_dir is None else folder_entries(source.video_dir))


def _load_encoders(job: PreprocessJob) -> Encoders:
    import torch

    from megatron_fsvideo.checkpoint.release import load_codec
    from megatron_fsvideo.data.preprocessing import Encoders, check_cache
    from megatron_fsvideo.models.frozen.encoders import load_image_encoder, load_text_encoder
    from megatron_fsvideo.parallel.dtypes import DTYPES

    name = job.work.device
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device, dtype = torch.device(name), DTYPES[job.work.dtype]
    codec = load_codec(job.encode.fsae)
    check_cache(Path(job.encode.output), codec.identity)
    # On a CPU bf16 does not speed up the small encoders.
    condition_dtype = dtype if device.type != "cpu" else torch.float32
    names, downloads = (job.encode.text_encoder, job.encode.image_encoder), job.encode.allow_download
    length = job.encode.text_max_length
    text = load_text_encoder(names[0], device, condition_dtype, length, allow_download=downloads)
    image = load_image_encoder(names[1], device, condition_dtype, allow_download=downloads)
    return Encoders(codec.to(device, dtype), job.encode.fsae, text, image)


if __name__ == "__main__":
    run_script(main)
