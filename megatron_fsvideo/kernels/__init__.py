"""Kernels of layer memory: Triton's beside the plain torch reference, with the same signatures."""

from megatron_fsvideo.kernels.choice import mixer_for
from megatron_fsvideo.kernels.mixing import Mixer, MixResult, MixSettings

__all__ = ["MixResult", "MixSettings", "Mixer", "mixer_for"]
