"""What the latent upsampler is (paper section 2.4.1) and what its losses weigh."""

from dataclasses import dataclass
from typing import Literal

GROUPS = 32
"""Groups of norm "group"."""


@dataclass(frozen=True)
class LatentUpsamplerConfig:
    """architecture of the latent upsampler (the defaults are 239.5M parameters)"""

    latent_channels: int = 128
    """Channels of the latents."""
    mid_channels: int = 512
    """Channels between the first and the last convolution."""
    blocks: tuple[int, int] = (0, 16)
    """Residual blocks before and after the doubling (paper: 16 after it; LTX-Video: 4 and 4)."""
    norm: Literal["pixel", "group"] = "pixel"
    """pixel: over the channels of each position; group: over 32 groups of channels and the whole clip, as LTX-Video,
    whose results then depend on the clip's length and size."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    time_padding: Literal["replicate", "zero"] = "replicate"
    """What convolutions see before the first and after the last frame: that frame again, or zeros (LTX-Video)."""

    def __post_init__(self) -> None:
        if min(self.latent_channels, self.mid_channels) < 1 or min(self.blocks) < 0 or len(self.blocks) != 2:
            raise ValueError(
                f"latent_channels {self.latent_channels} and mid_channels {self.mid_channels} must be positive, blocks "
                f"{self.blocks} two numbers that are not negative"
            )
        if self.norm == "group" and self.mid_channels % GROUPS:
            raise ValueError(
                f"norm group needs mid_channels that are a multiple of {GROUPS}, got {self.mid_channels}: change "
                "mid_channels, or use norm pixel"
            )


@dataclass(frozen=True)
class LatentUpsamplingLossConfig:
    """weights of the latent upsampler's losses (paper section 2.4.1)"""

    latent_weight: float = 0.1
    """Weight of the mean absolute error of the latents (paper: 0.1)."""
    pixel_weight: float = 0.1
    """Weight of the mean absolute error of the decoded video (paper: 0.1)."""
    perceptual_weight_start: float = 0.1
    """Weight of the perceptual loss in the first iteration (paper: 0.1)."""
    perceptual_weight_end: float = 1.0
    """Its weight after the ramp (paper: 1)."""
    perceptual_ramp: float = 0.5
    """Share of the run in which its weight rises linearly (the paper says "gradually")."""

    def __post_init__(self) -> None:
        weights = (self.latent_weight, self.pixel_weight, self.perceptual_weight_start, self.perceptual_weight_end)
        if min(weights) < 0 or not 0 <= self.perceptual_ramp <= 1:
            raise ValueError(
                "latent_weight, pixel_weight, perceptual_weight_start and perceptual_weight_end must not be negative, "
                f"got {weights}; perceptual_ramp must be in 0..1, got {self.perceptual_ramp}"
            )
