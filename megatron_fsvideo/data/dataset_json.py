"""dataset.json, which describes a latent dataset, and the null text beside it: writing, reading and checking them."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import safetensors.torch
from msgspec import Meta
from torch import Tensor

from megatron_fsvideo.data.latent_shards import (
    DATASET_FILE,
    FORMAT_VERSION,
    NULL_TEXT_FILE,
    LatentStatistics,
    ShardError,
    ShardManifest,
    ShardName,
    bucket_counts,
    read_json,
)
from megatron_fsvideo.data.outputs import write_bytes, write_json
from megatron_fsvideo.data.schema import checked
from megatron_fsvideo.data.text_files import TextError
from megatron_fsvideo.models.codecs import LatentCodec

# Parts that must be equal in all folders of a blend: the model sees one latent and one text space.
SHARED_FIELDS = ("autoencoder", "text_encoder", "image_encoder")

_Size = Annotated[int, Meta(ge=0, le=2**20)]
_Factor = Annotated[int, Meta(ge=1, le=4096)]


class AutoencoderRecord(msgspec.Struct, omit_defaults=True):
    """The autoencoder that made a dataset's latents.

    Attributes:
        path: where its weights are; generation looks for them there.
        fingerprint: identifies its weights. Latents of two fingerprints are never mixed.
        spatial_factor, temporal_factor: pixels and frames per latent position.
        latent_channels: c of latents [c, t, h, w].
        encoder_fingerprint, weights_fingerprint: of the encoder only and of all weights; None if unknown.
    """

    path: str
    fingerprint: Annotated[str, Meta(min_length=1)]
    spatial_factor: _Factor
    temporal_factor: _Factor
    latent_channels: _Factor
    encoder_fingerprint: str | None = None
    weights_fingerprint: str | None = None

    @classmethod
    def of(cls, codec: LatentCodec, path: str, fingerprint: str = "") -> "AutoencoderRecord":
        """Make the record of an autoencoder whose latents `codec` makes.

        Args:
            path: where its weights are.
            fingerprint: the name that an existing folder has for it; empty takes the encoder's.
        """
        identity, compression = codec.identity, codec.compression
        return cls(
            path,
            fingerprint or identity.encoder,
            compression.spatial,
            compression.temporal,
            codec.latent_channels,
            identity.encoder,
            identity.weights,
        )


class TextRecord(msgspec.Struct):
    """The encoder that made the text embeddings [l, embed_dim], l at most `max_length`. `embed_dim` 0 means none."""

    name: str = "none"
    embed_dim: _Size = 0
    max_length: _Size = 0


class ImageRecord(msgspec.Struct):
    """The encoder that made the first frames' embeddings [num_tokens, embed_dim]. `embed_dim` 0 means none."""

    name: str = "none"
    embed_dim: _Size = 0
    num_tokens: _Size = 0


class LatentSpace(msgspec.Struct):
    """The autoencoder and encoders that made a dataset's tensors. Folders of one blend agree on them."""

    autoencoder: AutoencoderRecord
    text_encoder: TextRecord
    image_encoder: ImageRecord


class _Statistics(msgspec.Struct):
    count: Annotated[int, Meta(ge=0)]
    total: list[float]
    total_square: list[float]


class _Dataset(LatentSpace):
    """The fields that are read; there may be more."""

    shards: list[ShardName]
    statistics: _Statistics
    fps: Annotated[float, Meta(gt=0, le=1e6)]
    latent_mean: list[float]
    latent_std: list[Annotated[float, Meta(gt=0)]]
    version: int = FORMAT_VERSION


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Read and check a folder's `dataset.json`.

    Raises:
        ShardError: missing (not a dataset, or preprocessing has not finished), damaged, or of another version.
    """
    path = folder / DATASET_FILE
    if not path.is_file():
        raise ShardError(f"{path} is missing: not a latent dataset, or tools/preprocess_latents.py has not finished")
    values = read_json(path)
    try:
        found = checked(str(path), _Dataset, values)
    except TextError as error:
        raise ShardError(f"{error} (damaged)") from error
    if found.version != FORMAT_VERSION:
        raise ShardError(f"{path}: format version {found.version}, this code reads {FORMAT_VERSION}")
    # The defaults of these records are for datasets that are written, not for a damaged file.
    for name, kind in (("text_encoder", TextRecord), ("image_encoder", ImageRecord)):
        if missing := [field for field in kind.__struct_fields__ if field not in values[name]]:
            raise ShardError(f"{path}: {name} lacks the field {', '.join(missing)} (damaged)")
    channels = found.autoencoder.latent_channels
    sums = found.statistics
    lists = {"latent_mean": found.latent_mean, "latent_std": found.latent_std}
    lists |= {"statistics.total": sums.total, "statistics.total_square": sums.total_square}
    for name, numbers in lists.items():
        if len(numbers) != channels:
            raise ShardError(f"{path}: {name} has {len(numbers)} numbers for {channels} latent channels")
    return values


def write_dataset_json(
    folder: Path,
    space: LatentSpace,
    manifests: Sequence[ShardManifest],
    null_text: Tensor,
    negative_text: Tensor,
    negative_prompt: str,
) -> None:
    """Complete a dataset: write `null_text.safetensors`, and then `dataset.json`.

    Args:
        manifests: of the dataset's shards, which hold at least one sample.
        null_text, negative_text: [l, e], the embeddings of "" and of `negative_prompt`.

    Raises:
        OutputError: a file cannot be written.
    """
    # Copies, for safetensors refuses tensors that share memory.
    texts = {"null_text": null_text.clone(), "negative_text": negative_text.clone()}
    write_bytes(folder / NULL_TEXT_FILE, safetensors.torch.save(texts))
    statistics = reduce(add, (manifest.statistics for manifest in manifests), LatentStatistics())
    mean, std = statistics.mean_std()
    samples = [sample for manifest in manifests for sample in manifest.samples]
    description = {
        "version": FORMAT_VERSION,
        **msgspec.to_builtins(space),
        "negative_prompt": negative_prompt,
        "fps": median(sample.fps for sample in samples),
        "num_samples": len(samples),
        "buckets": bucket_counts(manifests),
        "latent_mean": mean,
        "latent_std": std,
        "statistics": {
            "count": statistics.count,
            "total": list(statistics.total),
            "total_square": list(statistics.total_square),
        },
        "skipped": [pair for manifest in manifests for pair in manifest.skipped],
        "duplicates": sum(manifest.duplicates for manifest in manifests),
        "shards": [manifest.shard for manifest in manifests],
    }
    write_json(folder / DATASET_FILE, description)
