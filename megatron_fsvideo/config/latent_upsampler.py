"""Configuration of the latent upsampler and the weights of its losses (paper section 2.4.1)."""

from dataclasses import dataclass
from typing import Literal

from megatron_fsvideo.config.rules import Checked, Depth, NonNegative, Positive, PositiveInt, Share

GROUPS = 32
"""Groups of norm "group"."""


@dataclass(frozen=True)
class LatentUpsamplerConfig(Checked):
    """architecture of the latent upsampler (the defaults are 239.5M parameters)"""

    latent_channels: PositiveInt = 128
    """Number of channels of the latents."""
    mid_channels: PositiveInt = 512
    """Number of channels between the first and the last convolution."""
    blocks: tuple[Depth, Depth] = (0, 16)
    """Number of residual blocks before and after the doubling (paper: 16 after it; LTX-Video: 4 and 4)."""
    norm: Literal["pixel", "group"] = "pixel"
    """pixel normalises over the channels of each position. group normalises over 32 groups of channels and the whole
    clip (LTX-Video): the result then depends on the clip's length and size."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of the norms."""
    time_padding: Literal["replicate", "zero"] = "replicate"
    """Padding of convolutions in time: replicate repeats the first and the last frame, zero adds zeros (LTX-Video)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "group" and self.mid_channels % GROUPS:
            raise ValueError(
                f"norm group needs mid_channels that are a multiple of {GROUPS}, got {self.mid_channels}: change "
                "mid_channels, or use norm pixel"
            )


@dataclass(frozen=True)
class LatentUpsamplingLossConfig(Checked):
    """weights of the latent upsampler's losses (paper section 2.4.1)"""

    latent_weight: NonNegative = 0.1
    """Weight of the mean absolute error of the latents (paper: 0.1)."""
    pixel_weight: NonNegative = 0.1
    """Weight of the mean absolute error of the decoded video (paper: 0.1)."""
    perceptual_weight_start: NonNegative = 0.1
    """Weight of the perceptual loss in the first iteration (paper: 0.1)."""
    perceptual_weight_end: NonNegative = 1.0
    """Weight of the perceptual loss after the ramp (paper: 1)."""
    perceptual_ramp: Share = 0.5
    """Share of the run in which the weight of the perceptual loss rises linearly (paper: "gradually")."""
