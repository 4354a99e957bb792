"""Weights that lie whole in a file, filled into the sharded tensors of any layout: releases, and old autoencoders."""

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
    """Whole tensors by name, read one at a time."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        ...


class OldAutoencoder:
    """One set of weights in the training.pt that the autoencoder's training wrote up to format 1.

    Args:
        kind: `weights`, `ema` or `adversary`.

    Raises:
        ValueError: the file is damaged, or has no such weights.
    """

    def __init__(self, checkpoint: Path, kind: str) -> None:
        path = checkpoint / OLD_TRAINING_FILE
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[kind]
        except Exception as error:  # torch raises whatever its parser stumbles over
            raise ValueError(f"{path} is damaged or missing: {str(error).strip().splitlines()[0]}") from error
        if found is None:
            raise ValueError(f"{path} has no {kind}")
        self._tensors: dict[str, Tensor] = found["weights"] if kind == "adversary" else found
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._tensors[name]


def is_old_autoencoder(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder is of the autoencoder's training, of format 1."""
    return (checkpoint / OLD_TRAINING_FILE).is_file() and not (checkpoint / METADATA_FILE).exists()


def fill_sharded(state: dict[str, Any], stored: StoredWeights, prefix: str, where: str) -> dict[str, Any]:
    """The state with the slice of a stored tensor in place of each sharded tensor.

    Args:
        state: nested dict of Megatron's ShardedTensors of one network.
        prefix: of their keys, which the stored names lack.

    Raises:
        ValueError: a tensor is missing, or of another shape.
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
