"""Latents as points, one flattened clip each: from an autoencoder and videos, or from files (paper Table 1).

A point is a whole clip's latents: the dimensions that the paper reports exceed the channels of one position.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.shot_index import ShotIndex
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.data.video import VideoError
from megatron_fsvideo.evaluation.clips import read_clip
from megatron_fsvideo.models.codecs import LatentCodec
from megatron_fsvideo.parallel.team import Team

LATENTS_NAME = "latents"


@torch.no_grad()
def encode_clips(
    codec: LatentCodec, clips: Sequence[Shot], data: VideoDataConfig, team: Team, index: ShotIndex | None = None
) -> tuple[Tensor, dict[str, str]]:
    """Points [n, features] fp32 in the order of the clips, and name -> reason of clips that could not be read.

    Every process of the team encodes its share and gets all points.
    """
    found: dict[int, np.ndarray | str] = {}
    for number, clip in team.share(clips):
        try:
            video = read_clip(clip, data, index)
        except VideoError as error:
            found[number] = str(error)
            continue
        found[number] = codec.encode(video).flatten().float().cpu().numpy()
    found = team.gather(found)
    skipped = {clips[k].name: reason for k, reason in found.items() if isinstance(reason, str)}
    points = [value for value in found.values() if not isinstance(value, str)]
    if not points:
        raise ValueError(f"none of the {len(clips)} clips could be read: {next(iter(skipped.values()))}")
    return torch.from_numpy(np.stack(points)), skipped


def read_points(path: str, bucket: str | None, count: int) -> Tensor:
    """Up to `count` points [n, features] of a file or a latent dataset, spread evenly over it.

    Args:
        path: `.npy` or `.safetensors` (one tensor, or one that is called "latents") with the points along the first
            axis, or a folder of tools/preprocess_latents.py.
        bucket: which clip shape of a dataset, as 17x256x256; may be None where there is only one.

    Raises:
        ValueError: missing, damaged, or several shapes to choose from.
    """
    if Path(path).is_dir():
        return _dataset_points(path, bucket, count)
    if bucket is not None:
        raise ValueError(f"--bucket {bucket} is for latent datasets, {path} is a file")
    values = _read_tensor(path)
    if values.ndim < 2 or not values.is_floating_point():
        raise ValueError(f"{path}: points are floating-point [number, ...], got {values.dtype} {list(values.shape)}")
    return values[_spread(len(values), count)].flatten(1).float()


def _read_tensor(path: str) -> Tensor:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    try:
        if path.endswith(".npy"):
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if not path.endswith(".safetensors"):
            raise ValueError("not a .npy or .safetensors file")
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no readable points ({error})") from error
    if len(tensors) != 1 and LATENTS_NAME not in tensors:
        raise ValueError(f"{path} holds {len(tensors)} tensors, none called {LATENTS_NAME!r}: which are the points?")
    return tensors.get(LATENTS_NAME, next(iter(tensors.values())))


def _dataset_points(path: str, bucket: str | None, count: int) -> Tensor:
    dataset = LatentDataset([path])
    streams = [k for k, stream in enumerate(dataset.streams) if bucket in (None, str(stream.bucket))]
    if len(streams) != 1:
        shapes = ", ".join(str(stream.bucket) for stream in dataset.streams)
        raise ValueError(
            f"{path} has clips of {shapes}: choose one with --bucket" + (f", not {bucket}" if bucket else "")
        )
    chosen = _spread(dataset.streams[streams[0]].num_samples, count)
    return torch.stack([dataset.read(streams[0], int(k)).latents.flatten().float() for k in chosen])


def _spread(available: int, count: int) -> Tensor:
    return torch.linspace(0, available - 1, min(available, count), dtype=torch.float64).round().long()
