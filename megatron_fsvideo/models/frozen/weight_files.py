"""Weights from files that users bring: tensors only, never code."""

import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def read_weight_file(flag: str, path: str) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file, or of a torch file that holds nothing else, or that under "state_dict".

    Args:
        flag: what the user calls the file, for messages.

    Raises:
        ValueError: missing, damaged, or a file with more than tensors in it (a TorchScript program, a whole model).
    """
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path} does not exist")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{flag} {path} is damaged or holds more than tensors (TorchScript and pickled models are programs, which "
            f"are not run here): save its state_dict as safetensors ({(str(error) or repr(error)).splitlines()[0]})"
        ) from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{flag} {path} is no dictionary of tensors: save the state_dict alone")
    return dict(weights)
