"""Which block, resampling factor, convolution and norm a stage has: all that is read off the configuration."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.attention import EViTBlock
from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, CenterConv3d, ConvKind, GroupCausalConv3d
from megatron_fsvideo.models.fsae.first_frame import FirstFrameAttention
from megatron_fsvideo.models.fsae.layers import Factor, PixelNorm, ResBlock
from megatron_fsvideo.models.fsae.resampling import InterpolateUp, SubPixelUp
from megatron_fsvideo.models.fsae.streaming import Stream

TEMPORAL_STAGES = 2
"""The pixel-side stages whose way in halves time ("outer two blocks", paper section 2.2.1)."""


def resample_factor(stage: int) -> Factor:
    """Factor between stage `stage` and the next deeper one; stage 0 is the pixel side."""
    return (2 if stage < TEMPORAL_STAGES else 1, 2, 2)


def frames_per_latent(stage: int) -> int:
    """Frames that a latent after the first has at a stage: 4, 2, 1, 1, ..."""
    return 2 ** max(0, TEMPORAL_STAGES - stage)


def decoder_conv(config: FSAEConfig, stage: int) -> ConvKind:
    """The decoder's convolution at a stage. Lite's groups are the frames that one latent has there: 1, 2 or 4."""
    if config.decoder == "standard":
        return CenterConv3d
    if config.decoder == "lite":
        return partial(GroupCausalConv3d, group=frames_per_latent(stage))
    return CausalConv3d


def attends_to_first_frame(config: FSAEConfig, stage: int) -> bool:
    """Whether a decoder stage takes first-frame features: those that have one frame per latent."""
    return config.decoder != "causal" and stage >= TEMPORAL_STAGES


def branch_norm(config: FSAEConfig, channels: int) -> PixelNorm:
    """The norm that ends a residual branch; a gain below 1 makes the block start near the identity."""
    return PixelNorm(channels, config.norm_epsilon, config.norm_affine, config.residual_init)


def plain_norm(config: FSAEConfig, channels: int) -> PixelNorm:
    """A norm in front of something: the decoder's head, attention."""
    return PixelNorm(channels, config.norm_epsilon, config.norm_affine)


def is_residual_stage(config: FSAEConfig, stage: int) -> bool:
    """Whether a stage has residual blocks, which see a neighbourhood; attention sees the whole frame."""
    return stage < len(config.widths) - config.attention_stages


def build_stage(
    config: FSAEConfig, stage: int, depth: int, channels: int, conv: ConvKind = CausalConv3d, noise_weight: float = 0.0
) -> "Stage":
    """`depth` blocks at stage `stage`.

    Raises:
        ValueError: a width that does not split into attention heads.
    """
    head_dim = config.attention_head_dim
    if is_residual_stage(config, stage):
        return Stage(ResBlock(channels, branch_norm(config, channels), conv, noise_weight) for _ in range(depth))
    if depth and channels % head_dim:
        raise ValueError(f"width {channels} of stage {stage} is not a multiple of attention_head_dim {head_dim}")
    return Stage(
        EViTBlock(channels, head_dim, branch_norm(config, channels), branch_norm(config, channels), conv)
        for _ in range(depth)
    )


def build_up(config: FSAEConfig, stage: int) -> nn.Module:
    """The decoder's Up into `stage`. Its convolution runs at the deeper stage's frames."""
    deeper, width = config.decoder_channels[stage + 1], config.decoder_channels[stage]
    conv = decoder_conv(config, stage + 1)
    if stage < TEMPORAL_STAGES or config.upsampling == "sub-pixel":
        return SubPixelUp(deeper, width, resample_factor(stage), config.resample_init, conv=conv)
    return InterpolateUp(deeper, width, config.resample_init, conv)


def build_first_frame_attention(config: FSAEConfig, stage: int) -> FirstFrameAttention:
    """The attention at the entry of a decoder stage."""
    channels, feature_channels = config.decoder_channels[stage], config.widths[stage]
    norms = (plain_norm(config, channels), plain_norm(config, feature_channels))
    return FirstFrameAttention(
        channels, feature_channels, config.first_frame_head_dim, config.first_frame_window, norms
    )


class Stage(nn.ModuleList):
    """Blocks at one resolution, one after the other.

    Attributes:
        recompute: keep only each block's input for the backward pass, and compute the block again there.
    """

    recompute = False

    def forward(self, x: Tensor, stream: Stream | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape.

        Args:
            noise: one map per block, for residual blocks alone.
        """
        for k, block in enumerate(self):
            arguments = (x, stream) if noise is None else (x, stream, noise[k])
            if self.recompute and (stream is None or not stream.advances):
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x
