"""What a checkpoint of the autoencoder's training holds, and how `CheckpointWriter` writes it.

SAVE/iter_0000100/model/           the (averaged) weights as a release folder, which others load
SAVE/iter_0000100/training.pt      everything training continues with: tensors and numbers, read without pickle's code
SAVE/iter_0000100/job.json, checksums.json
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.checksums import checksums_of, write_checksums, write_text_atomically
from megatron_fsvideo.checkpoint.release import CONFIG_FILE, MODEL_FOLDER, WEIGHTS_FILE, save_fsae
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE
from megatron_fsvideo.checkpoint.writer import Work
from megatron_fsvideo.models.fsae import FSAE

TRAINING_FILE = "training.pt"
_FILES = (f"{MODEL_FOLDER}/{CONFIG_FILE}", f"{MODEL_FOLDER}/{WEIGHTS_FILE}", TRAINING_FILE)


def plan_fsae_checkpoint(
    target: Path,
    fsae: FSAE,
    weights: dict[str, Tensor],
    content: dict[str, Any],
    record: dict[str, Any],
    *,
    is_rank_zero: bool,
    in_background: bool,
) -> Work:
    """Rank 0 writes everything: all ranks hold the same.

    Args:
        target: an empty folder.
        weights: for the release folder, by `fsae`'s names.
        content: for `training.pt`.
        record: JSON-able; becomes job.json.
        in_background: copy everything to host memory now, because it will change while it is written.
    """
    if not is_rank_zero:
        return Work(0, lambda: {}, lambda results: None)
    if in_background:
        weights, content = _copied(weights), _copied(content)

    def write() -> dict[str, int]:
        save_fsae(target / MODEL_FOLDER, fsae, weights)
        torch.save(content, target / TRAINING_FILE)
        for name in _FILES:
            with (target / name).open("rb") as file:
                os.fsync(file.fileno())
        return checksums_of(target, _FILES)

    def complete(results: list[dict[str, int]]) -> None:
        write_text_atomically(target / JOB_FILE, json.dumps(record, indent=1) + "\n")
        checksums = results[0] | checksums_of(target, (JOB_FILE,))
        write_checksums(target, checksums)

    return Work(_num_bytes(weights) + _num_bytes(content), write, complete)


def _copied(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _num_bytes(value: Any) -> int:
    sizes: list[int] = []
    _mapped(value, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Nested dicts and lists with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _mapped(item, function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, function) for item in value]
    return value
