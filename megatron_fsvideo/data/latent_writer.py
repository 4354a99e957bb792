"""Latent datasets of a user's own latents and embeddings (docs/data_format.md), as preprocessing writes them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.dataset_json import LatentSpace, write_dataset_json
from megatron_fsvideo.data.latent_shards import (
    DATASET_FILE,
    SHARD_FOLDER,
    LatentSample,
    ShardManifest,
    find_manifests,
    hash_key,
    read_manifest,
    write_shard,
)
from megatron_fsvideo.data.outputs import try_folder
from megatron_fsvideo.data.schema import checked


@dataclass(frozen=True)
class OwnClip:
    """One clip of the user's own tensors. They may have any floating-point type and are stored as bf16.

    Attributes:
        latents: [c, t, h, w], not normalised. `latents[:, 0]` is the first frame's alone.
        fps: frames per second of the video.
        caption: for people, and for lists of samples; what is trained on is `text`.
        text: [l, e], the caption's own rows, without padding; None without text encoder.
        image: [n, e], of the first frame; None without image encoder.
        source, start: file and first frame that the clip was cut from, for people.
    """

    latents: Tensor
    fps: float
    caption: str = ""
    text: Tensor | None = None
    image: Tensor | None = None
    source: str = ""
    start: int = 0


class LatentShardWriter:
    """Writes clips to the shards of a dataset folder, and then `dataset.json`.

        writer = LatentShardWriter("data/latents", space)
        writer.write(clips)  # a generator: one clip is in memory at a time
        writer.finish(null_text)

    Several processes may write to one folder, each its own `part`; one of them finishes when all are done.

    Args:
        folder: without a finished dataset in it.
        space: what made the tensors.
        samples_per_shard: clips of a shard.

    Raises:
        ValueError: there is a dataset already, or the description is not valid.
        OutputError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, space: LatentSpace, samples_per_shard: int = 256) -> None:
        self.folder = Path(folder)
        self.space = checked("the description of the latents", LatentSpace, msgspec.to_builtins(space))
        self._samples_per_shard = samples_per_shard
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}, give at least 1")
        if (self.folder / DATASET_FILE).exists():
            raise ValueError(f"{self.folder} holds a dataset already: choose another folder")
        try_folder(folder)

    def write(self, clips: Iterable[OwnClip], part: str = "0") -> int:
        """Write clips, read one by one, to shards named after `part`; returns how many.

        Equal clips of a shard are written once.

        Raises:
            ValueError: a tensor does not fit the description, or the part has shards already.
        """
        if not re.fullmatch("[0-9A-Za-z_]{1,64}", part):
            raise ValueError(f"part {part!r}: spell it with letters, digits and _")
        if mine := [path for path in find_manifests(self.folder) if path.name.rpartition("-")[0] == part]:
            raise ValueError(f"{mine[0]} is there already: delete the shards of part {part}, or choose another part")
        samples = (self._sample(clip, index) for index, clip in enumerate(clips))
        written, number = 0, 0
        while (first := next(samples, None)) is not None:
            shard = chain([first], islice(samples, self._samples_per_shard - 1))
            name, fingerprint = f"{part}-{number:06d}", self.space.autoencoder.fingerprint
            written += len(write_shard(self.folder / SHARD_FOLDER, name, fingerprint, shard).samples)
            number += 1
        return written

    def finish(self, null_text: Tensor | None = None, negative_text: Tensor | None = None, prompt: str = "") -> None:
        """Write `dataset.json`: all shards of the folder are now a dataset.

        Args:
            null_text: [l, e], the embedding of "", which takes a dropped caption's place; None without text encoder.
            negative_text: [l, e], the embedding of `prompt`, for guidance; None takes `null_text`.

        Raises:
            ValueError: no shards, shards of another autoencoder, or embeddings that do not fit the description.
        """
        manifests = [read_manifest(path) for path in find_manifests(self.folder)]
        self._check_shards(manifests)
        null_text = self._text("null_text", null_text)
        negative_text = null_text if negative_text is None else self._text("negative_text", negative_text)
        write_dataset_json(self.folder, self.space, manifests, null_text, negative_text, prompt)

    def _check_shards(self, manifests: list[ShardManifest]) -> None:
        if not any(manifest.samples for manifest in manifests):
            raise ValueError(f"{self.folder} has no clips yet")
        fingerprint = self.space.autoencoder.fingerprint
        if others := [manifest.shard for manifest in manifests if manifest.autoencoder != fingerprint]:
            raise ValueError(f"{self.folder}: {others[0]} holds latents of another autoencoder")

    def _sample(self, clip: OwnClip, index: int) -> LatentSample:
        name = f"clip {index} ({clip.source})" if clip.source else f"clip {index}"
        autoencoder, image = self.space.autoencoder, self.space.image_encoder
        latents = _stored(f"{name}: latents", clip.latents, (autoencoder.latent_channels, None, None, None))
        tokens = (image.num_tokens, image.embed_dim)
        embedding = _stored(f"{name}: image", _or_none(clip.image), tokens if image.embed_dim else (0, 0))
        text = self._text(f"{name}: text", clip.text)
        frames, height, width = latents.shape[1:]
        side = autoencoder.spatial_factor
        bucket = Bucket(1 + (frames - 1) * autoencoder.temporal_factor, height * side, width * side)
        if not 0 < clip.fps <= 1e6:
            raise ValueError(f"{name}: fps is {clip.fps}, give frames per second")
        keys = {
            "latent_key": hash_key("latent", _bytes(latents), bucket, f"{clip.fps:.6f}", autoencoder.fingerprint),
            "text_key": hash_key("text", clip.caption, _bytes(text), self.space.text_encoder.name),
            "image_key": hash_key("image", _bytes(embedding), image.name),
        }
        record = keys | {
            "key": hash_key(*keys.values()),
            "caption": clip.caption,
            "source": clip.source,
            "start": clip.start,
            "num_frames": bucket.num_frames,
            "fps": float(clip.fps),
            "bucket": str(bucket),
        }
        return LatentSample(latents, text, embedding, record)

    def _text(self, name: str, text: Tensor | None) -> Tensor:
        encoder = self.space.text_encoder
        rows = None if encoder.embed_dim else 0
        stored = _stored(name, _or_none(text), (rows, encoder.embed_dim))
        if len(stored) > encoder.max_length:
            raise ValueError(f"{name} has {len(stored)} rows, the text encoder's max_length is {encoder.max_length}")
        return stored


def _or_none(tensor: Tensor | None) -> Tensor:
    return torch.zeros(0, 0) if tensor is None else tensor


def _stored(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """A tensor as shards hold it.

    Args:
        shape: what it must have; None is any length.

    Raises:
        ValueError: another shape or type, or numbers that are not finite.
    """
    fits = tensor.ndim == len(shape)
    fits = fits and all(want in (None, have) for have, want in zip(tensor.shape, shape, strict=True))
    spelled = [length if length is not None else "any" for length in shape]
    if not fits or not tensor.is_floating_point():
        raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, the description asks for floats {spelled}")
    stored = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    if not stored.isfinite().all():
        raise ValueError(f"{name}: holds numbers that are not finite")
    return stored


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
