"""The causal decoder (paper section 2.2.1): latent 0 makes frame 0, latent i frames 4i-3 .. 4i."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import TEMPORAL_STAGES, build_stage, head_norm, resample_factor
from megatron_fsvideo.models.fsae.layers import CausalConv3d, repeat_channels
from megatron_fsvideo.models.fsae.resampling import InterpolateUp, SubPixelUp
from megatron_fsvideo.models.fsae.streaming import StreamCache


class Decoder(nn.Module):
    """A convolution from the latents, then blocks and an Up per stage, then the head.

    The two outer Ups, which double time, are sub-pixel ("channel-to-time-spatial"); the inner ones interpolate. With
    depth 0 at the pixel side the head itself is the last Up, and `widths[0]` has no feature map.
    """

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        widths, depths = config.widths, config.decoder_depths
        self.last_stage = 0 if depths[0] else 1
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1], init_scale=config.resample_init)
        stages = range(len(widths) - 1, self.last_stage - 1, -1)
        self.ups = nn.ModuleList(_build_up(config, stage) for stage in stages[1:])
        self.stages = nn.ModuleList(build_stage(config, stage, depths[stage]) for stage in stages)
        self.head_norm = head_norm(config, widths[self.last_stage])
        if self.last_stage == 0:
            self.head: nn.Module = CausalConv3d(widths[0], 3)
        else:
            self.head = SubPixelUp(widths[1], 3, resample_factor(0), config.resample_init, shortcut=False)

    def forward(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        """latents [b, c, k+1, h, w] -> video [b, 3, 4k+1, h*s, w*s]; in a continued stream 4 frames of each."""
        x = self.conv_in(latents, cache)
        x = x + repeat_channels(latents.to(x.dtype), x.shape[1])
        for up, stage in zip([None, *self.ups], self.stages, strict=True):
            x = stage(x if up is None else up(x, cache), cache)
        return self.head(F.relu(self.head_norm(x)), cache)


def _build_up(config: FSAEConfig, stage: int) -> nn.Module:
    """The Up into `stage` from the deeper one."""
    deeper, width = config.widths[stage + 1], config.widths[stage]
    if stage < TEMPORAL_STAGES:
        return SubPixelUp(deeper, width, resample_factor(stage), config.resample_init)
    return InterpolateUp(deeper, width, config.resample_init)
