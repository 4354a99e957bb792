"""dataset.json, which describes a latent dataset: reading and checking it."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megatron_fsvideo.data.latent_shards import DATASET_FILE, FORMAT_VERSION, ShardError, ShardName, read_json
from megatron_fsvideo.data.schema import checked
from megatron_fsvideo.data.text_files import TextError

# Parts that must be equal in all folders of a blend: the model sees one latent and one text space.
SHARED_FIELDS = ("autoencoder", "text_encoder", "image_encoder")

_Size = Annotated[int, Meta(ge=0, le=2**20)]
_Factor = Annotated[int, Meta(ge=1, le=4096)]


class _Autoencoder(msgspec.Struct):
    fingerprint: Annotated[str, Meta(min_length=1)]
    spatial_factor: _Factor
    temporal_factor: _Factor
    latent_channels: _Factor


class _Text(msgspec.Struct):
    name: str
    embed_dim: _Size
    max_length: _Size


class _Image(msgspec.Struct):
    name: str
    embed_dim: _Size
    num_tokens: _Size


class _Statistics(msgspec.Struct):
    count: Annotated[int, Meta(ge=0)]
    total: list[float]
    total_square: list[float]


class _Dataset(msgspec.Struct):
    """The fields that are read; there may be more."""

    autoencoder: _Autoencoder
    text_encoder: _Text
    image_encoder: _Image
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
    channels = found.autoencoder.latent_channels
    sums = found.statistics
    lists = {"latent_mean": found.latent_mean, "latent_std": found.latent_std}
    lists |= {"statistics.total": sums.total, "statistics.total_square": sums.total_square}
    for name, numbers in lists.items():
        if len(numbers) != channels:
            raise ShardError(f"{path}: {name} has {len(numbers)} numbers for {channels} latent channels")
    return values
