"""The causal encoder (paper section 2.2.1): latent 0 sees frame 0 alone, latent i frames up to 4i."""

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import TEMPORAL_STAGES, build_stage, resample_factor
from megatron_fsvideo.models.fsae.convolutions import CausalConv3d
from megatron_fsvideo.models.fsae.layers import group_mean
from megatron_fsvideo.models.fsae.resampling import Down
from megatron_fsvideo.models.fsae.streaming import Stream


class Encoder(nn.Module):
    """Stem, then blocks and a Down per stage, then a convolution to the latents.

    With depth 0 at the pixel side the stem itself goes to stage 1 (DC-AE's), and `widths[0]` has no feature map.

    Attributes:
        num_outer: stages that `outer` runs: those whose Down halves time.
    """

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        widths, depths = config.widths, config.encoder_depths
        if widths[-1] % config.latent_channels:
            raise ValueError(
                f"the last width {widths[-1]} is not a multiple of latent_channels {config.latent_channels}"
            )
        self.latent_channels = config.latent_channels
        self.first_stage = 0 if depths[0] else 1
        self.num_outer = TEMPORAL_STAGES - self.first_stage
        if self.first_stage == 0:
            self.stem: nn.Module = CausalConv3d(3, widths[0])
        else:
            self.stem = Down(3, widths[1], resample_factor(0), 1.0, shortcut=False)
        if config.patchify_init:
            _init_identity(self.stem)
        stages = range(self.first_stage, len(widths))
        self.stages = nn.ModuleList(build_stage(config, stage, depths[stage], widths[stage]) for stage in stages)
        self.downs = nn.ModuleList(
            Down(widths[stage], widths[stage + 1], resample_factor(stage), config.resample_init)
            for stage in stages[:-1]
        )
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels, init_scale=config.resample_init)

    def forward(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        """video [b, 3, 4k+1, h, w] -> latents [b, c, k+1, h/s, w/s]; a continued stream takes 4k frames to k."""
        return self.inner(self.outer(video, stream), stream)

    def outer(self, video: Tensor, stream: Stream | None) -> Tensor:
        """The stages before the latents' frame rate, with their Downs: [b, c, k+1, h/4, w/4]. They need most memory."""
        x = self.stem(video, stream)
        for stage, down in zip(self.stages[: self.num_outer], self.downs[: self.num_outer], strict=True):
            x = down(stage(x, stream), stream)
        return x

    def inner(self, x: Tensor, stream: Stream | None) -> Tensor:
        """Encode the output of `outer` to latents."""
        x = self.stages[self.num_outer](x, stream)
        for down, stage in zip(self.downs[self.num_outer :], self.stages[self.num_outer + 1 :], strict=True):
            x = stage(down(x, stream), stream)
        return self.conv_out(x, stream) + group_mean(x, self.latent_channels)

    def stage_outputs(self, video: Tensor, stream: Stream | None) -> list[Tensor]:
        """Features of each stage that has some, before its Down, pixel side first."""
        x = self.stem(video, stream)
        outputs = []
        for down, stage in zip([None, *self.downs], self.stages, strict=True):
            x = stage(x if down is None else down(x, stream), stream)
            outputs.append(x)
        return outputs


@torch.no_grad()
def _init_identity(stem: nn.Module) -> None:
    """Copy the pixels of a stem's cell (1, or 2x2x2 with a Down) to its first channels; the rest stays random."""
    conv = stem.conv if isinstance(stem, Down) else stem
    time_stride, stride = conv.stride
    conv.weight.mul_(0.3)
    # Space: taps 1, 2 are pixels 2j, 2j+1 of cell j (tap 1 alone without stride). Time: the last taps are the newest.
    cells = [(c, t, y, x) for t in range(time_stride) for c in range(3) for y in range(stride) for x in range(stride)]
    for channel, (c, t, y, x) in enumerate(cells[: conv.weight.shape[0]]):
        conv.weight[channel] = 0.0
        conv.weight[channel, c, conv.kernel_size - 1 - t, 1 + y, 1 + x] = 1.0
