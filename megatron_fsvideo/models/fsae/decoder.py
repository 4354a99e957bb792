"""The decoder in its three kinds (paper sections 2.2.1, 2.2.3).

| kind | a frame sees | streams | first frame, noise | widths |
|---|---|---|---|---|
| causal | the past | exactly | no | the encoder's |
| Standard | both ways | no: tiles are blended | yes | the encoder's |
| Lite | the past, and its own latent's frames | exactly | yes | half at the two pixel-side stages |

Latent 0 makes frame 0, latent i frames 4i-3 .. 4i. Everything else is one network: what differs is the convolution
(`decoder_conv`), and that Standard and Lite attend to the first frame (`FirstFrameAttention`) and get noise.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import (
    attends_to_first_frame,
    build_first_frame_attention,
    build_stage,
    build_up,
    decoder_conv,
    frames_per_latent,
    is_residual_stage,
    plain_norm,
    resample_factor,
)
from megatron_fsvideo.models.fsae.context import DecodeContext, Window
from megatron_fsvideo.models.fsae.layers import repeat_channels
from megatron_fsvideo.models.fsae.resampling import SubPixelUp

OUTER_STAGES = 3
"""The pixel-side stages that patch training runs on a patch alone (paper section 2.2.1: "the remaining 3 blocks")."""


class Decoder(nn.Module):
    """A convolution from the latents, then an Up, first-frame attention and blocks per stage, then the head.

    The two outer Ups, which double time, are sub-pixel ("channel-to-time-spatial"); the inner ones interpolate. With
    depth 0 at the pixel side the head itself is the last Up, and `widths[0]` has no feature map.

    Attributes:
        streams: whether a video can be decoded in chunks with the result of one call.
        num_outer: stages that `outer` runs.
    """

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        widths, depths = config.decoder_channels, config.decoder_depths
        if widths[-1] % config.latent_channels:
            raise ValueError(
                f"the decoder's last width {widths[-1]} is not a multiple of latent_channels {config.latent_channels}"
            )
        self.streams = config.decoder != "standard"
        self.last_stage = 0 if depths[0] else 1
        self.stage_numbers = list(range(len(widths) - 1, self.last_stage - 1, -1))
        self.num_outer = min(OUTER_STAGES, len(widths) - 1) - self.last_stage
        noise_weight = config.noise_weight if config.decoder != "causal" else 0.0
        self.noise_shape = config.noise_shape
        self.noisy_stages = [s for s in self.stage_numbers if noise_weight and is_residual_stage(config, s)]

        deepest = self.stage_numbers[0]
        self.conv_in = decoder_conv(config, deepest)(
            config.latent_channels, widths[-1], init_scale=config.resample_init
        )
        self.ups = nn.ModuleList(build_up(config, stage) for stage in self.stage_numbers[1:])
        self.stages = nn.ModuleList(
            build_stage(config, stage, depths[stage], widths[stage], decoder_conv(config, stage), noise_weight)
            for stage in self.stage_numbers
        )
        self.head_norm = plain_norm(config, widths[self.last_stage])
        conv = decoder_conv(config, self.last_stage)
        if self.last_stage == 0:
            self.head: nn.Module = conv(widths[0], 3)
        else:
            self.head = SubPixelUp(widths[1], 3, resample_factor(0), config.resample_init, shortcut=False, conv=conv)
        self.first_frame = nn.ModuleList(
            build_first_frame_attention(config, stage)
            for stage in self.stage_numbers
            if attends_to_first_frame(config, stage)
        )

    def forward(self, latents: Tensor, context: DecodeContext | None = None) -> Tensor:
        """latents [b, c, k+1, h, w] -> video [b, 3, 4k+1, h*s, w*s]; in a continued stream 4 frames of each."""
        context = context or DecodeContext()
        h, window = self.inner(latents, context)
        return self.outer(h, window, context)

    def inner(self, latents: Tensor, context: DecodeContext) -> tuple[Tensor, Window]:
        """All but the outer stages: features [b, c', k+1, h', w'] and where they lie in the frame."""
        window = context.window_of(latents)
        x = self.conv_in(latents, context.stream)
        x = x + repeat_channels(latents.to(x.dtype), x.shape[1])
        x = self._stage(0, x, window, context)
        for k in range(1, len(self.stages) - self.num_outer):
            window = window.doubled()
            x = self._stage(k, self.ups[k - 1](x, context.stream), window, context)
        return x, window

    def outer(self, h: Tensor, window: Window, context: DecodeContext) -> Tensor:
        """The outer stages and the head, from what `inner` makes, or any box of it."""
        x = h
        for k in range(len(self.stages) - self.num_outer, len(self.stages)):
            window = window.doubled()
            x = self._stage(k, self.ups[k - 1](x, context.stream), window, context)
        return self.head(F.relu(self.head_norm(x)), context.stream)

    def _stage(self, k: int, x: Tensor, window: Window, context: DecodeContext) -> Tensor:
        """First-frame attention and blocks of the k-th stage from the inside."""
        stage = self.stage_numbers[k]
        if k < len(self.first_frame) and context.features is not None:
            # Features come pixel side first and end with the innermost stage, as the first k does.
            x = self.first_frame[k](x, context.features[-1 - k], window)
        noise = None
        if stage in self.noisy_stages:
            sites = [f"stage {stage}, block {n}" for n in range(len(self.stages[k]))]
            if self.noise_shape == "spatial":
                noise = [context.noise_map(site, window, x) for site in sites]
            else:
                noise = [context.noise_volume(site, window, x, frames_per_latent(stage)) for site in sites]
        return self.stages[k](x, context.stream, noise)
