"""A small latent dataset of random numbers, for tests that train."""

import json
from pathlib import Path

import safetensors.torch
import torch

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_shards import (
    DATASET_FILE,
    NULL_TEXT_FILE,
    SHARD_FOLDER,
    LatentSample,
    hash_key,
    write_shard,
)

CHANNELS, TEXT_WIDTH, TEXT_LENGTH, IMAGE_WIDTH = 4, 12, 6, 10
BUCKET = "5x32x32"
SPATIAL_FACTOR = 8


def write_latent_dataset(
    folder: Path,
    num_samples: int = 24,
    fingerprint: str = "a" * 64,
    seed: int = 0,
    nan_sample: int = -1,
    buckets: tuple[str, ...] = (BUCKET,),
    latent_std: float = 1.0,
) -> Path:
    """Latents that the debug preset's model fits, one shard, of the buckets in turn; `nan_sample`'s loss is NaN."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [Bucket.parse(bucket).latent_shape(SPATIAL_FACTOR) for bucket in buckets]

    def sample(index: int) -> LatentSample:
        key = hash_key("sample", seed, index)
        record = {
            "key": key,
            "latent_key": key,
            "text_key": key,
            "image_key": key,
            "bucket": buckets[index % len(buckets)],
            "fps": 8.0,
            "caption": f"sample {index}",
        }
        latents = torch.randn(CHANNELS, *shapes[index % len(buckets)], generator=generator).bfloat16()
        if index == nan_sample:
            latents[0, -1, 2, 3] = 3e38
        return LatentSample(
            latents=latents,
            text=torch.randn(1 + index % TEXT_LENGTH, TEXT_WIDTH, generator=generator).bfloat16(),
            image=torch.randn(3, IMAGE_WIDTH, generator=generator).bfloat16(),
            record=record,
        )

    manifest = write_shard(folder / SHARD_FOLDER, "0000", fingerprint, (sample(k) for k in range(num_samples)))
    if nan_sample >= 0:
        # The statistics of such a shard are refused; the sample stands for whatever makes a loss that is not finite.
        path = folder / SHARD_FOLDER / "0000.json"
        path.write_text(path.read_text().replace("Infinity", "0.0"))
    null = torch.randn(2, TEXT_WIDTH, generator=generator).bfloat16()
    safetensors.torch.save_file({"null_text": null, "negative_text": null.clone()}, folder / NULL_TEXT_FILE)
    description = {
        "autoencoder": {
            "path": "autoencoder",
            "fingerprint": fingerprint,
            "spatial_factor": SPATIAL_FACTOR,
            "temporal_factor": 4,
            "latent_channels": CHANNELS,
        },
        "text_encoder": {"name": "random", "embed_dim": TEXT_WIDTH, "max_length": TEXT_LENGTH},
        "image_encoder": {"name": "random", "embed_dim": IMAGE_WIDTH, "num_tokens": 3},
        "latent_mean": [0.0] * CHANNELS,
        "latent_std": [latent_std] * CHANNELS,
        "statistics": {"count": 1, "total": [0.0] * CHANNELS, "total_square": [1.0] * CHANNELS},
        "fps": 8.0,
        "buckets": {bucket: len(range(k, num_samples, len(buckets))) for k, bucket in enumerate(buckets)},
        "shards": [manifest.shard],
    }
    (folder / DATASET_FILE).write_text(json.dumps(description))
    return folder
