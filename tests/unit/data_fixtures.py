"""Small videos, a stand-in autoencoder and ready latent datasets for the data tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_fsvideo.config import Compression
from megatron_fsvideo.data.bucketed_clips import BucketedClips
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clip_dataset import ClipDataset
from megatron_fsvideo.data.clips import ClipOptions
from megatron_fsvideo.data.manifest import VideoEntry
from megatron_fsvideo.data.preprocessing import Encoders, PreprocessOptions
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.models.codecs import CodecIdentity
from megatron_fsvideo.models.frozen.encoders import NoImage


class TinyAutoencoder(nn.Module):
    """4 x 4 pixels and 4 frames per latent position, 6 random channels; frame 0 stands alone."""

    compression, latent_channels = Compression(4), 6

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(6, 3, 4, 4, 4, generator=generator), requires_grad=False)
        self.encoded_clips = 0
        self.identity = CodecIdentity(f"{seed:x}" * 64, f"{seed + 8:x}" * 64)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """[b, 3, f, h, w] -> [b, 6, 1 + (f - 1) / 4, h / 4, w / 4]."""
        self.encoded_clips += len(video)
        padded = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)
        return nn.functional.conv3d(padded, self.weight.to(video.dtype), stride=4)


class LetterText:
    """One row per letter: its code in all 5 channels."""

    name, embed_dim, max_length = "letters", 5, 12

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, captions):
        self.encoded += captions
        embeddings = torch.zeros(len(captions), self.max_length, self.embed_dim)
        lengths = torch.tensor([min(len(caption), self.max_length) for caption in captions])
        for row, caption in zip(embeddings, captions, strict=True):
            for k, letter in enumerate(caption[: self.max_length]):
                row[k] = ord(letter) / 64
        return embeddings, lengths


class CornerImage:
    """Two rows: the mean colour of the left and of the right half."""

    name, embed_dim, num_tokens = "corner", 3, 2

    def encode(self, images):
        return torch.stack([half.mean((2, 3)) for half in images.chunk(2, dim=3)], dim=1)


def moving_video(num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [f, h, w, 3]: smooth random colours drifting to the left."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 10, generator=generator)
    still = nn.functional.interpolate(coarse, (height, width + 2 * num_frames), mode="bicubic").clamp(0, 1)[0]
    frames = [still[:, :, 2 * k : 2 * k + width] for k in range(num_frames)]
    return (torch.stack(frames) * 255).to(torch.uint8).movedim(1, -1).contiguous()


def make_videos(folder: Path, count: int, num_frames: int = 9, size: tuple[int, int] = (32, 32)) -> list[VideoEntry]:
    """Videos with different content and captions, as entries with a range."""
    entries = []
    for k in range(count):
        path = folder / f"video{k}.mp4"
        write_video(path, moving_video(num_frames, *size, seed=k), fps=8)
        entries.append(VideoEntry(str(path), path.name, f"clip {k}", 0, num_frames))
    return entries


def write_manifest(path: Path, entries: list[VideoEntry]) -> Path:
    """A JSONL manifest of entries."""
    lines = [
        json.dumps({"path": e.path, "caption": e.caption, "start": e.start, "num_frames": e.num_frames})
        for e in entries
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_encoders(seed: int = 0, image=None) -> Encoders:
    """The stand-ins; another seed is another autoencoder."""
    return Encoders(TinyAutoencoder(seed), "tiny", LetterText(), image or NoImage())


def tiny_options(*buckets: str, **changes) -> PreprocessOptions:
    """Options with 4 samples a shard and batches of 3."""
    clips = ClipOptions(tuple(Bucket.parse(text) for text in (buckets or ("9x32x32",))))
    return PreprocessOptions(clips, **({"batch_size": 3, "samples_per_shard": 4} | changes))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def solid(color: tuple[int, int, int], num_frames: int, size: tuple[int, int] = (36, 64)) -> list[np.ndarray]:
    """Frames of one colour."""
    return [np.full((*size, 3), color, np.uint8)] * num_frames


def random_batch(clips: ClipDataset | BucketedClips, first: int, count: int, *shape: Any) -> torch.Tensor:
    """Clips `first` to `first + count - 1` of a shape, stacked."""
    return torch.stack([clips.random_clip(first + k, *shape) for k in range(count)])
