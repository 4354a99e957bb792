"""Latent shards: what `tools/preprocess_latents.py` writes and training reads (docs/data_format.md).

A dataset is a folder with `dataset.json`, `null_text.safetensors` and shards. A shard is an ordinary WebDataset tar
with two members per sample, `KEY.safetensors` and `KEY.json`, and beside it a manifest `SHARD.json` with each sample's
bucket, byte range and checksum, which makes reading random-access. Files appear by rename: they are whole or absent,
and a manifest appears after its tar.
"""

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from msgspec import Meta

from megatron_fsvideo.config.rules import Count, shown
from megatron_fsvideo.data import text_files
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.listing import files_in
from megatron_fsvideo.data.outputs import replacing, write_bytes
from megatron_fsvideo.data.schema import checked
from megatron_fsvideo.data.text_files import TextError, one_line

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
NULL_TEXT_FILE = "null_text.safetensors"
SHARD_FOLDER = "shards"


ShardName = Annotated[str, Meta(pattern=r"^[^/\\\x00]+\.tar$")]


class ShardError(ValueError):
    """A shard or dataset folder that is damaged or does not fit. The message is one line that names the file."""


@dataclass(frozen=True)
class LatentSample:
    """One sample as it is stored.

    Attributes:
        latents: [c, t, h, w], bf16, as the autoencoder puts them out (not normalised). The first frame's is [:, 0].
        text: [l, e], bf16, l the caption's own length; [0, 0] without text encoder.
        image: [n, e], bf16; [0, 0] without image encoder.
        record: the JSON member: caption, source, clip range, fps, bucket, keys.
    """

    latents: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor
    record: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of the sample in its tar."""
        return self.record["key"]


@dataclass(frozen=True)
class SampleEntry:
    """Place of a sample in its shard, and the values by which it is chosen without being read."""

    key: Annotated[str, Meta(pattern="^[0-9a-f]{15,64}$")]
    latent_key: str
    text_key: str
    image_key: str
    bucket: str
    fps: Annotated[float, Meta(gt=0, le=1e6)]
    offset: Count
    length: Count
    crc32: Annotated[int, Meta(ge=0, lt=2**32)]
    json_offset: Count
    json_length: Count


@dataclass(frozen=True)
class LatentStatistics:
    """Sums over all latent positions, per channel. A dataset's mean and std follow from its shards' sums."""

    count: Count = 0
    total: tuple[float, ...] = ()
    total_square: tuple[float, ...] = ()

    @classmethod
    def of(cls, latents: torch.Tensor) -> "LatentStatistics":
        """Sums of one sample's latents [c, t, h, w]."""
        values = latents.double().flatten(1)
        return cls(values.shape[1], tuple(values.sum(1).tolist()), tuple(values.square().sum(1).tolist()))

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        if not self.count or not other.count:
            return other if not self.count else self
        return LatentStatistics(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            tuple(a + b for a, b in zip(self.total_square, other.total_square, strict=True)),
        )

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation; a channel without variance gets 1 (it would divide by zero)."""
        mean = [total / self.count for total in self.total]
        variance = [max(0.0, s / self.count - m * m) for s, m in zip(self.total_square, mean, strict=True)]
        return mean, [v**0.5 if v > 1e-12 else 1.0 for v in variance]


@dataclass(frozen=True)
class ShardManifest:
    """The JSON file beside a tar.

    Attributes:
        shard: file name of the tar.
        size: its bytes.
        autoencoder: fingerprint of the weights that made the latents.
        skipped: name and reason of each clip that could not be read.
        duplicates: clips left out because an equal one is there.
    """

    shard: ShardName
    size: Count
    autoencoder: str
    samples: tuple[SampleEntry, ...]
    statistics: LatentStatistics = field(default_factory=LatentStatistics)
    skipped: tuple[tuple[str, str], ...] = ()
    version: int = FORMAT_VERSION
    duplicates: Count = 0


def hash_key(*parts: object) -> str:
    """32 hex digits that depend on every part, and on where one ends and the next begins."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]


def sample_id(key: str) -> int:
    """The number a sample's randomness is drawn from: 60 bits of its key, the same in every blend and order."""
    return int(key[:15], 16)


def write_shard(
    folder: Path,
    name: str,
    autoencoder: str,
    samples: Iterable[LatentSample],
    skipped: Sequence[tuple[str, str]] = (),
) -> ShardManifest:
    """Write `name.tar` and then its manifest `name.json`; samples are consumed one by one, `skipped` after the last.

    Args:
        folder: the dataset's shard folder.
        autoencoder: fingerprint stored in the manifest.
        skipped: may be a list that the producer of `samples` still appends to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.tar"
    entries: list[SampleEntry] = []
    statistics, keys, duplicates = LatentStatistics(), set[str](), 0
    with replacing(target) as temporary, temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                # Equal clips with equal captions have one key, and readers of tars take a name that repeats for damage.
                if sample.key in keys:
                    duplicates += 1
                    continue
                keys.add(sample.key)
                entries.append(_add_sample(file, tar, sample))
                statistics += LatentStatistics.of(sample.latents)
        size = file.tell()
    if duplicates:
        logger.warning("%s: %d clips are equal to others, captions included, and left out", target.name, duplicates)
    manifest = ShardManifest(
        target.name, size, autoencoder, tuple(entries), statistics, tuple(skipped), duplicates=duplicates
    )
    write_bytes(folder / f"{name}.json", json.dumps(asdict(manifest)).encode())
    return manifest


def read_manifest(path: Path) -> ShardManifest:
    """Read a shard's manifest and check that its tar is all there.

    Raises:
        ShardError: damaged, or the tar is missing or has another size.
    """
    try:
        manifest = checked(str(path), ShardManifest, read_json(path))
        for bucket in {entry.bucket for entry in manifest.samples}:
            Bucket.parse(bucket)
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{path}: not a shard manifest ({error})") from error
    if manifest.version != FORMAT_VERSION:
        raise ShardError(f"{path}: format version {manifest.version}, this code reads {FORMAT_VERSION}")
    tar = path.with_name(manifest.shard)
    size = tar.stat().st_size if tar.is_file() else 0
    if size != manifest.size:
        raise ShardError(
            f"{tar}: corrupt shard: {size} bytes, its manifest says {manifest.size}; "
            f"copy it again, or delete it and {path.name} and run tools/preprocess_latents.py again"
        )
    return manifest


def read_sample(tar: Path, entry: SampleEntry) -> LatentSample:
    """Read one sample by its byte range.

    Raises:
        ShardError: the bytes do not have the manifest's checksum, or the file cannot be read.
    """
    try:
        with tar.open("rb") as file:
            file.seek(entry.offset)
            payload = file.read(entry.length)
            file.seek(entry.json_offset)
            record = file.read(entry.json_length)
    except OSError as error:
        raise ShardError(f"{tar}: sample {entry.key}: {error}") from error
    checksum = zlib.crc32(record, zlib.crc32(payload))
    if checksum != entry.crc32:
        raise ShardError(
            f"{tar}: sample {entry.key} at byte {entry.offset}: checksum {checksum:08x}, expected {entry.crc32:08x}"
        )
    where = f"{tar}: sample {entry.key}"
    try:
        # A right checksum only says that the bytes are those which somebody wrote.
        tensors = safetensors.torch.load(payload)
        sample = LatentSample(
            tensors["latents"], tensors["text"], tensors["image"], _parse_record(where, record, entry)
        )
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ShardError(f"{where}: not a sample: {one_line(str(error))}") from error
    for name, tensor, axes in (("latents", sample.latents, 4), ("text", sample.text, 2), ("image", sample.image, 2)):
        if tensor.ndim != axes or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ShardError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {axes} axes of finite numbers"
            )
    return sample


def read_record(tar: Path, entry: SampleEntry) -> dict[str, Any]:
    """Read one sample's JSON member by its byte range.

    Raises:
        ShardError: it is not that sample's, or the file cannot be read.
    """
    try:
        with tar.open("rb") as file:
            file.seek(entry.json_offset)
            return _parse_record(f"{tar}: sample {entry.key}", file.read(entry.json_length), entry)
    except (OSError, ValueError) as error:
        raise ShardError(f"{tar}: sample {entry.key}: damaged JSON member ({error})") from error


def _parse_record(where: str, data: bytes, entry: SampleEntry) -> dict[str, Any]:
    """A sample's JSON member.

    Raises:
        ValueError: not JSON, or another sample's.
    """
    record = text_files.parse_json(data.decode("utf-8"), where)
    if not isinstance(record, dict) or record.get("key") != entry.key:
        raise ValueError(f"the JSON member at byte {entry.json_offset} is not that of {entry.key}")
    if record.get("bucket") != entry.bucket or not isinstance(record.get("caption"), str):
        raise ValueError(f"the JSON member's bucket is {shown(record.get('bucket'))}, the manifest's {entry.bucket!r}")
    return record


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ShardError: missing or not JSON.
    """
    try:
        return text_files.read_json(path)
    except TextError as error:
        raise ShardError(f"{error} (damaged or missing)") from error


def find_manifests(dataset: Path) -> list[Path]:
    """Manifests of all finished shards of a dataset folder, whether or not its `dataset.json` lists them, sorted."""
    return files_in(dataset / SHARD_FOLDER, ".json")


def bucket_counts(manifests: Iterable[ShardManifest]) -> dict[str, int]:
    """Bucket -> number of samples, in the buckets' order."""
    counts: dict[Bucket, int] = {}
    for manifest in manifests:
        for entry in manifest.samples:
            bucket = Bucket.parse(entry.bucket)
            counts[bucket] = counts.get(bucket, 0) + 1
    return {str(bucket): counts[bucket] for bucket in sorted(counts)}


def _add_sample(file: Any, tar: tarfile.TarFile, sample: LatentSample) -> SampleEntry:
    tensors = {"latents": sample.latents, "text": sample.text, "image": sample.image}
    payload = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    record = json.dumps(dict(sample.record), sort_keys=True, ensure_ascii=False).encode()
    offset = _add_member(file, tar, f"{sample.key}.safetensors", payload)
    json_offset = _add_member(file, tar, f"{sample.key}.json", record)
    keys = {name: sample.record[name] for name in ("key", "latent_key", "text_key", "image_key", "bucket", "fps")}
    checksum = zlib.crc32(record, zlib.crc32(payload))
    return SampleEntry(
        **keys,
        offset=offset,
        length=len(payload),
        crc32=checksum,
        json_offset=json_offset,
        json_length=len(record),
    )


def _add_member(file: Any, tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; returns the offset of its data. Owner and time stay zero: equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = file.tell() + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
