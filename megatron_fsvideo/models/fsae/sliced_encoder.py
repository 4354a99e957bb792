"""Encoding a long video in training with the memory of a slice.

The encoder streams, and each slice's inside is computed again in the backward pass. What passes from slice to slice,
the last input frames of each convolution, is an input and an output of the recomputed function: gradients flow.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.streaming import StreamCache


def encode_sliced(fsae: FSAE, video: Tensor, latents_per_slice: int) -> Tensor:
    """Encode a video with the result and gradients of `FSAE.encode`, but the memory of a slice.

    It costs one more forward pass.

    Raises:
        ValueError: a size that `FSAE.encode` refuses.
    """
    fsae.check_whole_video(video)
    convolutions = [module for module in fsae.encoder.modules() if isinstance(module, CausalConv3d)]

    def encode_slice(frames: Tensor, position: int, *tails: Tensor) -> tuple[Tensor, ...]:
        cache = StreamCache(position, tails=dict(zip(convolutions, tails, strict=position > 0)))
        latents = fsae.encode_chunk(frames, cache)
        return latents, *(cache.tails[module] for module in convolutions)

    size = latents_per_slice * fsae.temporal_factor
    first = size - fsae.temporal_factor + 1
    slices = [video[:, :, :first], *(video[:, :, first:].split(size, dim=2) if video.shape[2] > first else ())]
    latents, tails, position = [], (), 0
    for frames in slices:
        made, *tails = checkpoint(encode_slice, frames, position, *tails, use_reentrant=False)
        latents.append(made)
        position += frames.shape[2]
    return torch.cat(latents, dim=2)
