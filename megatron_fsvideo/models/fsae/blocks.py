"""Which block, resampling factor and norm a stage has: the one place that reads it off the configuration."""

from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.attention import EViTBlock
from megatron_fsvideo.models.fsae.layers import Factor, PixelNorm, ResBlock
from megatron_fsvideo.models.fsae.streaming import StreamCache

TEMPORAL_STAGES = 2
"""The pixel-side stages whose way in halves time ("outer two blocks", paper section 2.2.1)."""


def resample_factor(stage: int) -> Factor:
    """Factor between stage `stage` and the next deeper one; stage 0 is the pixel side."""
    return (2 if stage < TEMPORAL_STAGES else 1, 2, 2)


def branch_norm(config: FSAEConfig, channels: int) -> PixelNorm:
    """The norm that ends a residual branch; a gain below 1 makes the block start near the identity."""
    return PixelNorm(channels, config.norm_epsilon, config.norm_affine, config.residual_init)


def head_norm(config: FSAEConfig, channels: int) -> PixelNorm:
    """The norm before the decoder's last convolution."""
    return PixelNorm(channels, config.norm_epsilon, config.norm_affine)


def build_stage(config: FSAEConfig, stage: int, depth: int) -> "Stage":
    """`depth` blocks at stage `stage`.

    Raises:
        ValueError: a width that does not split into attention heads.
    """
    channels, head_dim = config.widths[stage], config.attention_head_dim
    if stage < len(config.widths) - config.attention_stages:
        return Stage(ResBlock(channels, branch_norm(config, channels)) for _ in range(depth))
    if depth and channels % head_dim:
        raise ValueError(f"width {channels} of stage {stage} is not a multiple of attention_head_dim {head_dim}")
    return Stage(
        EViTBlock(channels, head_dim, branch_norm(config, channels), branch_norm(config, channels))
        for _ in range(depth)
    )


class Stage(nn.ModuleList):
    """Blocks at one resolution, one after the other."""

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape."""
        for block in self:
            x = block(x, cache)
        return x
