"""From one training phase to the next: which weights a phase inherits, and which it must start itself (fsae_spec 5).

| phase | from | fresh in the autoencoder | discriminator |
|---|---|---|---|
| 2, 3, 4 | the phase before | nothing | phase 2 starts it; 3 and 4 go on with it |
| 5 Standard | phase 4 | the attention to the first frame | goes on |
| 6 Lite | phase 5 | the two narrower stages at the pixel side and what touches them | goes on |
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.release import FSAE_FORMAT, check_weights, load_release, resolve_release
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.training.fsae_adversary import Adversary

TRAINING_FILE = "training.pt"


def inherit_weights(source: str, fsae: FSAE, adversary: Adversary | None, device: torch.device) -> list[str]:
    """Start an autoencoder, and its discriminator if there is one to go on with, from an earlier phase; in place.

    Args:
        source: a --save folder, whose newest checkpoint is taken, or a release folder (without a discriminator).

    Returns:
        lines that say what was inherited and what is fresh.

    Raises:
        ValueError: not an autoencoder, or one that does not fit.
    """
    folder = resolve_release(source)
    config, weights = load_release(folder, device)
    if config.get("format") != FSAE_FORMAT:
        raise ValueError(f"--init-from {folder} holds {config.get('format')!r}, not an autoencoder")
    check_weights(str(folder), fsae, weights)
    fsae.load_state_dict(weights)
    lines = [f"autoencoder: {len(weights)} tensors from {folder}, none fresh"]
    if adversary is not None:
        saved = _saved_discriminator(folder)
        if saved is not None:
            adversary.load_weights(saved)
        lines.append(f"discriminator: {'fresh' if saved is None else f'{len(saved)} tensors from {folder.parent}'}")
    return lines


def _saved_discriminator(release: Path) -> dict[str, Tensor] | None:
    """The discriminator beside a checkpoint's release folder, if there is one."""
    path = release.parent / TRAINING_FILE
    if not path.is_file():
        return None
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return None if content.get("adversary") is None else content["adversary"]["weights"]
