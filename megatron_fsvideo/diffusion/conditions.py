"""Conditions of the DiT. Training, validation and generation all build them here.

Channels of the model's input, in order: noisy latents (c), mask (m), condition latents (c); as Wan2.1-I2V has them.
The mask has one channel per pixel frame of a latent frame; 1 means that the condition latents there are given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Everything but the noisy latents and their noise levels that the model receives.

    Attributes:
        mask: [b, m, t, h, w]; 1 where `latents` are given.
        latents: normalised condition latents [b, c, t, h, w].
        text: text embeddings [b, l, e]; None without a text encoder. A model without text attention ignores them.
        image: image embeddings [b, n, e]; None without an image encoder. Ignored likewise.
    """

    mask: Tensor
    latents: Tensor
    text: Tensor | None
    image: Tensor | None

    @property
    def channels(self) -> Tensor:
        """The model's input channels after the noisy latents [b, m + c, t, h, w]."""
        return torch.cat([self.mask, self.latents], dim=1)

    def model_input(self, noisy_latents: Tensor) -> Tensor:
        """The model's input [b, 2c + m, t, h, w] from noisy latents [b, c, t, h, w]."""
        return torch.cat([noisy_latents, self.mask, self.latents], dim=1)


def first_frame_condition(
    latents: Tensor,
    num_mask_channels: int,
    text: Tensor | None = None,
    image: Tensor | None = None,
    *,
    repeat: bool = False,
    hidden: Tensor | None = None,
) -> Condition:
    """The condition of image-to-video: latent frame 0 is given, the rest is zero (paper section 2.3).

    Args:
        latents: normalised latents [b, c, t, h, w], of which only frame 0 is read.
        text, image: embeddings [b, l, e] and [b, n, e], the image's of frame 0.
        repeat: put frame 0 in place of the zeros; the mask still marks frame 0 alone.
        hidden: bool [b], samples whose frame 0 is not given (text to image, text to video): mask, latents and image
            embeddings are zero. None hides none.
    """
    batch, _, frames, height, width = latents.shape
    mask = latents.new_zeros(batch, num_mask_channels, frames, height, width)
    mask[:, :, 0] = 1
    if repeat:
        condition = latents[:, :, :1].expand_as(latents)
    else:
        condition = torch.zeros_like(latents)
        condition[:, :, 0] = latents[:, :, 0]
    if hidden is not None:
        hidden = hidden.to(latents.device)
        mask, condition = (values.masked_fill(hidden.view(-1, 1, 1, 1, 1), 0) for values in (mask, condition))
        # Zeros, not None: every weight takes part in every step, as overlapped gradient reduction needs.
        image = None if image is None else image.masked_fill(hidden.view(-1, 1, 1), 0)
    return Condition(mask, condition, text, image)
