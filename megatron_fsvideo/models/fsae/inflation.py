"""From single frames to video: what a phase of image training leaves in the temporal taps, and how video starts.

A single frame fills every temporal tap of a causal convolution, so images train only the sum of the taps. Moving the
sum to the newest tap makes the network the image autoencoder applied frame by frame, as 2D weights are inflated
(fsae_spec section 3), and video training begins sharp instead of blurred over three frames.
"""

import torch

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.resampling import SubPixelUp


@torch.no_grad()
def begin_video(fsae: FSAE) -> None:
    """Turn weights trained on single frames into a frame-by-frame video autoencoder, in place. Images are unchanged."""
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
