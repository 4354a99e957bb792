"""Latent datasets as training sees them: map-style, random access by byte range, several folders blended by weight.

`LatentDataset` answers "sample 17 of stream 2"; which samples make a batch is the sampler's business (sampler.py), how
they become tensors batch.py's. A *stream* is one folder's samples of one bucket.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.dataset_json import SHARED_FIELDS, read_dataset_json
from megatron_fsvideo.data.latent_shards import (
    DATASET_FILE,
    NULL_TEXT_FILE,
    SHARD_FOLDER,
    LatentSample,
    LatentStatistics,
    SampleEntry,
    ShardError,
    read_manifest,
    read_record,
    read_sample,
)
from megatron_fsvideo.data.sample_order import list_record
from megatron_fsvideo.data.text_files import read_lines
from megatron_fsvideo.models.codecs import LatentScale, is_same_encoder

logger = logging.getLogger(__name__)

# Short, for 1e999999999 would be computed.
_NUMBER = re.compile(r"[-+]?(\d{1,15}(\.\d{0,15})?|\.\d{1,15})(e[-+]?\d{1,2})?|\d{1,15}/\d{1,15}", re.ASCII)


@dataclass(frozen=True)
class SampleStream:
    """One folder's samples of one bucket.

    Attributes:
        bucket: shape of its clips.
        folder_index: which folder of the blend.
        share: samples it contributes to one round of the blend; its own number of samples when nothing is weighted.
    """

    bucket: Bucket
    folder_index: int
    num_samples: int
    share: Fraction


@dataclass(frozen=True)
class SampleFilter:
    """Which samples of a dataset are used.

    Attributes:
        frames: numbers of frames; empty takes all.
        resolution: of buckets whose area is within a quarter of this side's square; None takes all.
        keys: the samples' keys; None takes all.
    """

    frames: tuple[int, ...] = ()
    resolution: int | None = None
    keys: frozenset[str] | None = None

    def takes_bucket(self, bucket: Bucket) -> bool:
        """Whether samples of this shape are used."""
        if self.frames and bucket.num_frames not in self.frames:
            return False
        area = self.resolution**2 if self.resolution else None
        return area is None or abs(bucket.height * bucket.width - area) <= area / 4

    def takes(self, entry: SampleEntry) -> bool:
        """Whether this sample is used, its bucket aside."""
        return self.keys is None or entry.key in self.keys


NO_FILTER = SampleFilter()


def read_sample_list(path: str | Path) -> frozenset[str]:
    """The keys in a sample list: the first word of each line; empty lines and those that begin with # are none.

    Raises:
        ValueError: the file is missing, or names no sample.
    """
    if not Path(path).is_file():
        raise ValueError(f"sample_list {path} does not exist")
    lines = (line.checked().split() for line in read_lines(path))
    keys = frozenset(words[0] for words in lines if words and not words[0].startswith("#"))
    if not keys:
        raise ValueError(f"sample_list {path} names no sample")
    return keys


class LatentDataset:
    """Samples of one or more latent dataset folders.

    Args:
        data_path: folders, or weights and folders in turn: `0.7 videos/ 0.3 images/`.
        max_bad_fraction: a larger share of unreadable samples raises; up to it they are replaced, counted and named.
        scale: what latents are normalised with instead of the folders' own mean and std. Validation passes the
            training data's: `scale=train_dataset.scale`.
        sample_filter: which samples are used; mean and std stay those of all.

    Raises:
        ShardError: a damaged folder, folders made by different autoencoders or encoders, or a filter that leaves a
            folder nothing.
    """

    def __init__(
        self,
        data_path: Sequence[str],
        max_bad_fraction: float = 0.01,
        scale: LatentScale | None = None,
        sample_filter: SampleFilter = NO_FILTER,
    ) -> None:
        weights, self.folders = parse_data_path(data_path)
        self._datasets = [read_dataset_json(folder) for folder in self.folders]
        _check_agreement(self.folders, self._datasets)
        self.max_bad_fraction = max_bad_fraction
        self.bad_samples: dict[str, str] = {}
        tables = [_read_entries(folder, values) for folder, values in zip(self.folders, self._datasets, strict=True)]
        tables = [_filtered(folder, table, sample_filter) for folder, table in zip(self.folders, tables, strict=True)]
        self._samples: list[list[tuple[Path, SampleEntry]]] = []
        self.streams: list[SampleStream] = []
        shares = _round_shares(weights, [sum(map(len, table.values())) for table in tables])
        for folder_index, (table, share) in enumerate(zip(tables, shares, strict=True)):
            for bucket in sorted(table):
                self._samples.append(table[bucket])
                size = len(table[bucket])
                self.streams.append(SampleStream(bucket, folder_index, size, share * size))
        _warn_of_missing(sample_filter, self._samples)
        self.scale = scale or _pooled_scale(self._datasets)
        self.null_text, self.negative_text = self._read_null_text()

    def __len__(self) -> int:
        return sum(stream.num_samples for stream in self.streams)

    @property
    def buckets(self) -> list[Bucket]:
        """All shapes there are."""
        return sorted({stream.bucket for stream in self.streams})

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self._datasets[0]["autoencoder"]["latent_channels"]

    @property
    def text_length(self) -> int:
        """Rows every text embedding is padded to (they are attended to, so the length is part of the model)."""
        return self._datasets[0]["text_encoder"]["max_length"]

    @property
    def text_embed_dim(self) -> int:
        """Width of the text embeddings; 0 without text."""
        return self._datasets[0]["text_encoder"]["embed_dim"]

    @property
    def image_embed_dim(self) -> int:
        """Width of the image embeddings; 0 without image encoder."""
        return self._datasets[0]["image_encoder"]["embed_dim"]

    def description(self) -> dict[str, Any]:
        """Description of the data for a checkpoint, JSON-able. With it generation needs no dataset folder."""
        shared = {name: self._datasets[0][name] for name in SHARED_FIELDS}
        return shared | {
            "latent_mean": list(self.scale.mean),
            "latent_std": list(self.scale.std),
            "fps": self._datasets[0]["fps"],
            "buckets": [str(bucket) for bucket in self.buckets],
            "streams": [[str(stream.bucket), stream.num_samples, str(stream.share)] for stream in self.streams],
        }

    @cached_property
    def list_records(self) -> list[dict[str, Any]]:
        """Each stream's record (sample_order.py): digests of its samples' keys and checksums, from the manifests."""
        return [
            list_record(
                f"the samples of {stream.bucket} in folder {stream.folder_index + 1} of data_path",
                (f"{entry.key} {entry.crc32}" for _, entry in samples),
            )
            for stream, samples in zip(self.streams, self._samples, strict=True)
        ]

    def bucket_tokens(self, patch_size: tuple[int, int, int]) -> dict[Bucket, int]:
        """Tokens of one sample of each bucket."""
        autoencoder = self._datasets[0]["autoencoder"]
        factors = autoencoder["spatial_factor"], autoencoder["temporal_factor"]
        return {bucket: bucket.num_tokens(*factors, patch_size) for bucket in self.buckets}

    def read(self, stream_index: int, position: int) -> LatentSample:
        """One sample. An unreadable one is replaced by the next of its stream, counted and named.

        Raises:
            ShardError: more than the allowed share of the dataset is unreadable.
        """
        samples = self._samples[stream_index]
        for step in range(len(samples)):
            path, entry = samples[(position + step) % len(samples)]
            if f"{path}:{entry.key}" in self.bad_samples:
                continue
            try:
                sample = read_sample(path, entry)
                self._check_shapes(path, entry, sample)
                return sample
            except ShardError as error:
                self._count_bad(f"{path}:{entry.key}", str(error))
        raise ShardError(f"{self.folders[self.streams[stream_index].folder_index]}: no readable sample left")

    def _check_shapes(self, path: Path, entry: SampleEntry, sample: LatentSample) -> None:
        """Refuse a sample that would not fit into a batch.

        Raises:
            ShardError: naming the sample and both shapes.
        """
        encoder, text, image = (self._datasets[0][name] for name in SHARED_FIELDS)
        sides = Bucket.parse(entry.bucket).latent_shape(encoder["spatial_factor"], encoder["temporal_factor"])
        rows = min(len(sample.text), text["max_length"])
        expected = {
            "latents": (encoder["latent_channels"], *sides),
            "text": (rows, text["embed_dim"]),
            "image": (image["num_tokens"], image["embed_dim"]),
        }
        found = {"latents": sample.latents.shape, "text": sample.text.shape, "image": sample.image.shape}
        for name, shape in expected.items():
            if tuple(found[name]) != shape:
                raise ShardError(f"{path}: sample {entry.key}: {name} is {list(found[name])}, expected {list(shape)}")

    def records(self) -> Iterator[dict[str, Any]]:
        """The JSON member of every sample that is used, without reading the latents.

        Raises:
            ShardError: one is damaged.
        """
        for samples in self._samples:
            for path, entry in samples:
                yield read_record(path, entry)

    def sample_key(self, stream_index: int, position: int) -> str:
        """The key under which the shards hold a sample, without reading it."""
        return self._samples[stream_index][position][1].key

    def _count_bad(self, name: str, reason: str) -> None:
        self.bad_samples[name] = reason
        logger.warning("skipped a bad sample (%d of %d so far): %s", len(self.bad_samples), len(self), reason)
        if len(self.bad_samples) > ceil(self.max_bad_fraction * len(self)):
            raise ShardError(
                f"{len(self.bad_samples)} of {len(self)} samples are unreadable, more than max_bad_fraction "
                f"{self.max_bad_fraction}; the last: {reason}"
            )

    def _read_null_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodings [l, e] of the empty and of the negative prompt, fp32."""
        path = self.folders[0] / NULL_TEXT_FILE
        try:
            tensors = safetensors.torch.load_file(path)
            return tensors["null_text"].float(), tensors["negative_text"].float()
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ShardError(f"{path}: missing or damaged ({error})") from error


def parse_data_path(data_path: Sequence[str]) -> tuple[list[Fraction] | None, list[Path]]:
    """Split `0.7 a/ 0.3 b/` into weights that sum to 1 and folders; weights are None for plain folders.

    Raises:
        ValueError: nothing given, weights for some folders only, or a weight that is not positive.
    """
    if not data_path:
        raise ValueError("data_path names no latent dataset; make one with tools/preprocess_latents.py")
    numbers = [_as_weight(item) for item in data_path]
    if all(number is None for number in numbers):
        return None, [Path(item) for item in data_path]
    paired = len(data_path) % 2 == 0 and all((number is not None) == (k % 2 == 0) for k, number in enumerate(numbers))
    if not paired:
        folders = [item for item in data_path if _NUMBER.fullmatch(item) and Path(item).is_dir()]
        hint = (
            f"; {folders[0]} is a folder here: name it ./{folders[0]}, and no weight like a folder" if folders else ""
        )
        raise ValueError(f"data_path is folders, or weight folder weight folder ..., got: {' '.join(data_path)}{hint}")
    weights = [number for number in numbers if number is not None]
    if min(weights) <= 0:
        raise ValueError(f"data_path weights must be positive, got {' '.join(data_path[::2])}")
    return [weight / sum(weights) for weight in weights], [Path(item) for item in data_path[1::2]]


def _as_weight(item: str) -> Fraction | None:
    """A weight; None for a folder, which may have a number for a name."""
    if not _NUMBER.fullmatch(item) or Path(item).is_dir():
        return None
    try:
        return Fraction(item)
    except ZeroDivisionError:
        return None


def _round_shares(weights: list[Fraction] | None, sizes: Sequence[int]) -> list[Fraction]:
    """Uses of each sample of a folder in a round of the blend. A round has as many samples as all folders."""
    if weights is None:
        return [Fraction(1)] * len(sizes)
    return [weight * sum(sizes) / size for weight, size in zip(weights, sizes, strict=True)]


def _read_entries(folder: Path, values: dict[str, Any]) -> dict[Bucket, list[tuple[Path, SampleEntry]]]:
    """All samples of a folder by bucket, in the order of shards and of samples in them."""
    table: dict[Bucket, list[tuple[Path, SampleEntry]]] = {}
    fingerprint = values["autoencoder"]["fingerprint"]
    for name in values["shards"]:
        tar = folder / SHARD_FOLDER / name
        manifest = read_manifest(tar.with_suffix(".json"))
        if manifest.autoencoder != fingerprint:
            raise ShardError(
                f"{tar} was made by autoencoder {manifest.autoencoder[:12]}, {folder / DATASET_FILE} says "
                f"{fingerprint[:12]}: run tools/preprocess_latents.py again into an empty folder"
            )
        for entry in manifest.samples:
            table.setdefault(Bucket.parse(entry.bucket), []).append((tar, entry))
    if not table:
        raise ShardError(f"{folder}: the dataset has no samples")
    return table


def _filtered(
    folder: Path, table: dict[Bucket, list[tuple[Path, SampleEntry]]], sample_filter: SampleFilter
) -> dict[Bucket, list[tuple[Path, SampleEntry]]]:
    """Samples of a folder that a filter takes."""
    if sample_filter == NO_FILTER:
        return table
    fitting = {bucket: samples for bucket, samples in table.items() if sample_filter.takes_bucket(bucket)}
    if not fitting:
        there = ", ".join(f"{bucket} ({len(samples)} samples)" for bucket, samples in sorted(table.items()))
        raise ShardError(
            f"{folder}: bucket_frames {' '.join(map(str, sample_filter.frames)) or 'none'} and bucket_resolution "
            f"{sample_filter.resolution} leave none of its buckets: {there}"
        )
    chosen = {
        bucket: [sample for sample in samples if sample_filter.takes(sample[1])] for bucket, samples in fitting.items()
    }
    chosen = {bucket: samples for bucket, samples in chosen.items() if samples}
    if not chosen:
        raise ShardError(
            f"{folder}: none of its {sum(map(len, fitting.values()))} samples is among the {len(sample_filter.keys)} "
            "keys of sample_list (tools/list_samples.py prints a dataset's keys)"
        )
    return chosen


def _warn_of_missing(sample_filter: SampleFilter, samples: list[list[tuple[Path, SampleEntry]]]) -> None:
    """Say how many of the wanted keys are not there: a list may be of another encoding of the same clips."""
    if sample_filter.keys is not None:
        found = {entry.key for stream in samples for _, entry in stream}
        if missing := len(sample_filter.keys - found):
            logger.warning("%d of the %d keys in sample_list are not used", missing, len(sample_filter.keys))


def _check_agreement(folders: Sequence[Path], datasets: Sequence[dict[str, Any]]) -> None:
    for folder, values in zip(folders[1:], datasets[1:], strict=True):
        ours, theirs = datasets[0]["autoencoder"], values["autoencoder"]
        if not is_same_encoder(ours, theirs):
            raise ShardError(
                f"{folders[0]} was made by autoencoder {ours['fingerprint'][:12]}, {folder} by "
                f"{theirs['fingerprint'][:12]}: latents of two autoencoders do not mix; encode both with one"
            )
        for name in ("text_encoder", "image_encoder"):
            if datasets[0][name] != values[name]:
                raise ShardError(
                    f"{folders[0]} has {name} {datasets[0][name]['name']}, {folder} has {values[name]['name']}: "
                    "make both with the same"
                )


def _pooled_scale(datasets: Sequence[dict[str, Any]]) -> LatentScale:
    """Mean and std of one folder as stored; of several folders, of all their latents together."""
    if len(datasets) == 1:
        return LatentScale(datasets[0]["latent_mean"], datasets[0]["latent_std"])
    pooled = LatentStatistics()
    for values in datasets:
        sums = values["statistics"]
        pooled += LatentStatistics(sums["count"], tuple(sums["total"]), tuple(sums["total_square"]))
    return LatentScale(*pooled.mean_std())
