"""The DiT's condition channels. Training, validation and generation all build them here.

Channels of the model's input, in order: noisy latents (c), mask (m), condition latents (c); as Wan2.1-I2V has them.
The mask has one channel per pixel frame of a latent frame; 1 means that the condition latents there are given.
"""

import torch
from torch import Tensor


def first_frame_condition(
    latents: Tensor, num_mask_channels: int, repeat: bool = False, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask and condition latents of image-to-video: latent frame 0 is given, the rest is zero (paper section 2.3).

    Args:
        latents: normalised latents [b, c, t, h, w], of which only frame 0 is read.
        repeat: put frame 0 in place of the zeros; the mask still marks frame 0 alone.
        hidden: bool [b], samples whose frame 0 is not given (text to image, text to video): all zeros. None hides none.

    Returns:
        mask [b, m, t, h, w] and condition latents [b, c, t, h, w].
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
        mask, condition = (values.masked_fill(hidden.view(-1, 1, 1, 1, 1), 0) for values in (mask, condition))
    return mask, condition


def build_model_input(noisy_latents: Tensor, mask: Tensor, condition_latents: Tensor) -> Tensor:
    """The DiT's input [b, 2c + m, t, h, w]."""
    return torch.cat([noisy_latents, mask, condition_latents], dim=1)
