"""A micro-batch: the tensors the training step takes.

Dimension letters: b samples, c latent channels, t h w latent frames, rows, columns, l text rows, n image rows,
e embedding width.
"""

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        sample_ids: int64 [b]; a sample's randomness is drawn from its id and epoch.
        epochs: int64 [b]: how often the sample has been seen before.
        latents: fp32 [b, c, t, h, w], normalised per channel with the dataset's mean and std.
        text: fp32 [b, l, e], zero rows after each caption's own; [b, l, 0] without text encoder.
        image: fp32 [b, n, e], or None without image encoder.
    """

    sample_ids: torch.Tensor
    epochs: torch.Tensor
    latents: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor | None

    @property
    def is_image(self) -> bool:
        """Whether the clips have one frame."""
        return self.latents.shape[2] == 1
