"""A stand-in for DINOv2 where its weights are not at hand: ImageNet features of EfficientNet-Lite0, from a package.

For trying phase 4 out on a laptop. Latents that are aligned with it are not the paper's: never report them as such.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.frozen.perceptual import EfficientNetTrunk

NAME = "efficientnet-lite0"
STRIDE = 16
"""Pixels per position of the trunk's last features."""
FRAMES_AT_ONCE = 16


class EfficientNetFeatures(nn.Module):
    """The frozen trunk's features at stride 16, with the interface of `DINOv2Features`.

    Args:
        grid: positions per side of a square frame; other shapes get about as many.
    """

    def __init__(self, grid: int = 16) -> None:
        super().__init__()
        self.trunk = EfficientNetTrunk().eval().requires_grad_(False)
        self.grid = grid
        with torch.no_grad():
            self.channels: int = self.trunk(torch.zeros(1, 3, 2 * STRIDE, 2 * STRIDE))[-1].shape[1]

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """video [b, 3, f, h, w] in [-1, 1] -> features [b, channels, f, rows, columns]."""
        b, _, num_frames, height, width = video.shape
        rows = max(1, round(self.grid * (height / width) ** 0.5))
        columns = max(1, round(self.grid * (width / height) ** 0.5))
        frames = video.transpose(1, 2).flatten(0, 1).float()
        size = (rows * STRIDE, columns * STRIDE)
        parts = [
            self.trunk(F.interpolate(part, size, mode="bicubic", antialias=True).clamp(-1, 1))[-1]
            for part in frames.split(FRAMES_AT_ONCE)
        ]
        return torch.cat(parts).float().unflatten(0, (b, num_frames)).movedim(2, 1)
