"""Causal encoder of the video autoencoder (paper section 2.2, Figure 2)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.attention import EViTBlock
from megatron_fsvideo.models.fsae.layers import CausalConv3d, Down, PixelNorm, ResBlock, group_mean
from megatron_fsvideo.models.fsae.streaming import StreamCache

NUM_TEMPORAL_STAGES = 2
"""The stages nearest the pixels that change the frame rate; each by 2."""


class Encoder(nn.Module):
    """Stages of blocks, a Down between two stages: video [b, 3, 4k+1, h, w] -> latents [b, c, k+1, h/s, w/s]."""

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        widths = config.widths
        if widths[-1] % config.latent_channels:
            raise ValueError(f"latent_channels {config.latent_channels} does not divide the inner width {widths[-1]}")
        self.latent_channels = config.latent_channels
        self.conv_in = CausalConv3d(3, widths[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(make_block(config, stage) for _ in range(depth))
            for stage, depth in enumerate(config.encoder_depths)
        )
        self.downs = nn.ModuleList(
            Down(widths[stage], widths[stage + 1], temporal_factor(stage)) for stage in range(len(widths) - 1)
        )
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels)
        self._initialize(config)

    def forward(self, video: Tensor, cache: StreamCache | None) -> Tensor:
        for features in self.stage_outputs(video, cache):
            pass
        return self.conv_out(features, cache) + group_mean(features, self.latent_channels)

    def stage_outputs(self, video: Tensor, cache: StreamCache | None) -> Iterator[Tensor]:
        """The features of each stage before its Down, pixel side first."""
        x = self.conv_in(video, cache)
        for index, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x, cache)
            yield x
            if index < len(self.downs):
                x = self.downs[index](x, cache)

    @torch.no_grad()
    def _initialize(self, config: FSAEConfig) -> None:
        for down in self.downs:
            down.conv.weight.mul_(config.resample_init)
        if config.patchify_init:
            patchify_(self.conv_in.conv)


def temporal_factor(stage: int) -> int:
    """Frames that become one between `stage` and the next."""
    return 2 if stage < NUM_TEMPORAL_STAGES else 1


def make_block(config: FSAEConfig, stage: int) -> nn.Module:
    """A block of a stage: EfficientViT in the innermost `attention_stages`, else residual convolutions."""
    width = config.widths[stage]
    if not config.norm_affine and config.residual_init != 1.0:
        raise ValueError(f"residual_init {config.residual_init} is a gain, which norm_affine off does not have")

    def branch_norm() -> PixelNorm:
        return PixelNorm(width, config.norm_epsilon, config.norm_affine, gain=config.residual_init)

    if stage >= len(config.widths) - config.attention_stages:
        return EViTBlock(width, config.attention_head_dim, branch_norm(), branch_norm())
    return ResBlock(width, branch_norm())


def patchify_(conv: nn.Conv3d) -> None:
    """Make output channel i a copy of one pixel of the current frame: colour i % 3, neighbour i // 3, centre first.

    Nothing is lost at the start, and the copies are distinct while there are at most 27.
    """
    centre_first = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 0), (0, 1), (0, 0), (0, 2), (2, 0)]
    conv.weight.zero_()
    conv.bias.zero_()
    for channel in range(conv.out_channels):
        row, column = centre_first[channel // 3 % len(centre_first)]
        conv.weight[channel, channel % 3, -1, row, column] = 1.0
