"""Fills the sharded tensors of any layout from whole weights in a file: releases, and old autoencoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from torch import Tensor

from megatron_fsvideo.checkpoint.safe_pickle import METADATA_FILE
from megatron_fsvideo.checkpoint.safetensors_shards import TensorInfo

OLD_TRAINING_FILE = "training.pt"


class StoredWeights(Protocol):
    """Whole tensors that are read one at a time by name."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        ...


class OldAutoencoder:
    """One set of weights in a training.pt, which the autoencoder's training wrote in format 1.

    Args:
        kind: `weights`, `ema` or `adversary`.

    Raises:
        ValueError: the file is damaged, or lacks these weights.
    """

    def __init__(self, checkpoint: Path, kind: str) -> None:
        path = checkpoint / OLD_TRAINING_FILE
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[kind]
        except Exception as error:  # torch's parser raises many kinds of errors
            raise ValueError(f"{path} is damaged or missing: {str(error).strip().splitlines()[0]}") from error
        if found is None:
            raise ValueError(f"{path} has no {kind}")
        self._tensors: dict[str, Tensor] = found["weights"] if kind == "adversary" else found
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._tensors[name]


def is_old_autoencoder(checkpoint: Path) -> bool:
    """Whether the autoencoder's training wrote this checkpoint's folder in format 1."""
    return (checkpoint / OLD_TRAINING_FILE).is_file() and not (checkpoint / METADATA_FILE).exists()


def fill_sharded(state: dict[str, Any], stored: StoredWeights, prefix: str, where: str) -> dict[str, Any]:
    """Replace each sharded tensor of a state by its slice of the stored tensor.

    Args:
        state: nested dict of Megatron's ShardedTensors of one network.
        prefix: prefix of the keys that the stored names lack.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, ShardedTensor):
            return leaf
        name = leaf.key.removeprefix(prefix)
        if name not in stored.infos:
            raise ValueError(f"{where} has no weight {name}, which this run's network has")
        if stored.infos[name].shape != tuple(leaf.global_shape):
            raise ValueError(
                f"{where} has another architecture: {name} is {list(stored.infos[name].shape)} there, "
                f"{list(leaf.global_shape)} in this run"
            )
        slices = tuple(slice(a, a + n) for a, n in zip(leaf.global_offset, leaf.local_shape, strict=True))
        return stored.read(name)[slices].to(leaf.dtype)

    return dict_list_map_outplace(fill, state)
