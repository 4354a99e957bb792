"""Causal decoder of the video autoencoder: the encoder's mirror (paper section 2.2, Figure 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.encoder import make_block, temporal_factor
from megatron_fsvideo.models.fsae.layers import CausalConv3d, InterpolateUp, PixelNorm, SubpixelUp, repeat_channels
from megatron_fsvideo.models.fsae.streaming import StreamCache


class Decoder(nn.Module):
    """Stages of blocks, an Up before each but the innermost: latents [b, c, k+1, h/s, w/s] -> video [b, 3, 4k+1, h, w].

    The temporal Ups of the outer stages are sub-pixel convolutions (the paper's channel-to-time-spatial), which never
    make the wide full-rate map; the inner ones interpolate, with a quarter of the weights (DC-AE's choice).
    """

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.inner_width = widths[-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1])
        self.stages = nn.ModuleList(
            nn.ModuleList(make_block(config, stage) for _ in range(depth))
            for stage, depth in enumerate(config.decoder_depths)
        )
        self.ups = nn.ModuleList(make_up(widths, stage) for stage in range(len(widths) - 1))
        self.norm_out = PixelNorm(widths[0], config.norm_epsilon, config.norm_affine)
        self.conv_out = CausalConv3d(widths[0], 3)
        self._initialize(config)

    def forward(self, latents: Tensor, cache: StreamCache | None) -> Tensor:
        x = self.conv_in(latents, cache) + repeat_channels(latents, self.inner_width)
        for index in reversed(range(len(self.stages))):
            if index < len(self.ups):
                x = self.ups[index](x, cache)
            for block in self.stages[index]:
                x = block(x, cache)
        return self.conv_out(F.relu(self.norm_out(x)), cache)

    @torch.no_grad()
    def _initialize(self, config: FSAEConfig) -> None:
        for up in self.ups:
            up.conv.conv.weight.mul_(config.resample_init)


def make_up(widths: tuple[int, ...], stage: int) -> SubpixelUp | InterpolateUp:
    """The Up into `stage`."""
    factor = temporal_factor(stage)
    if factor == 1:
        return InterpolateUp(widths[stage + 1], widths[stage])
    return SubpixelUp(widths[stage + 1], widths[stage], factor)
