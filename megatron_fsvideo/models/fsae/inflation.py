"""Turns image weights into video weights: 2D kernels become 3D ones, and temporal taps are set for video.

An image kernel goes to the tap of the present frame: the network is then the image network applied frame by frame.
"""

import torch
from torch import Tensor

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, VideoConv3d
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.resampling import SubPixelUp


@torch.no_grad()
def begin_video(fsae: FSAE) -> None:
    """Turn weights trained on single frames into a frame-by-frame video autoencoder, in place. Images are unchanged.

    A single frame fills every temporal tap of a causal convolution, so images train only the sum of the taps. Moving
    the sum to the newest tap begins video training sharp instead of blurred over three frames.

    Raises:
        ValueError: a Standard or Lite decoder, which is trained after video began.
    """
    if fsae.config.decoder != "causal":
        raise ValueError(f"video begins with a causal decoder, this one is {fsae.config.decoder}")
    # A stem straight into time stride 2 has no shortcut: with one tap it would not see every second frame at all.
    kept = fsae.encoder.stem.conv if fsae.encoder.first_stage else None
    for module in fsae.modules():
        if isinstance(module, CausalConv3d) and module is not kept:
            newest = module.weight.sum(dim=2)
            module.weight.zero_()
            module.weight[:, :, -1] = newest
        if isinstance(module, SubPixelUp) and module.factor[0] == 2:
            # Time is the fastest channel: even ones make the frame that the start of a video drops, so images never
            # train them.
            module.conv.weight[0::2] = module.conv.weight[1::2]
            module.conv.bias[0::2] = module.conv.bias[1::2]


def inflate(kernel: Tensor, conv: VideoConv3d) -> Tensor:
    """2D kernel [o, i, 3, 3] -> [o, i, 3, 3, 3] that applies it to the present frame: the causal conv's last tap."""
    inflated = kernel.new_zeros(*kernel.shape[:2], conv.kernel_size, *kernel.shape[2:])
    inflated[:, :, 2 if isinstance(conv, CausalConv3d) else 1] = kernel
    return inflated


def fold_interpolation(kernel: Tensor) -> Tensor:
    """Kernel after repeating pixels 2x2 -> the equal kernel before it, with a channel per pixel: [4o, i, 3, 3].

    Exact, at zero-padded borders too. Per axis the first pixel of two sees (low -1: tap 0, low 0: taps 1 + 2), the
    second (low 0: taps 0 + 1, low +1: tap 2).
    """
    fold = kernel.new_tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])
    return torch.einsum("oiyx,pay,qbx->opqiab", kernel, fold, fold).flatten(0, 2)


def over_time(channels: Tensor) -> Tensor:
    """Channels [4c, ...] of a 2D Up -> [8c, ...] of one that doubles time too: both frames alike, time fastest."""
    return channels.repeat_interleave(2, dim=0)
