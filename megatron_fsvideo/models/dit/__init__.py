"""The diffusion transformer with layer memory (paper section 2.3)."""

from megatron_fsvideo.models.dit.build import build_dit, build_dit_chunks, transformer_config
from megatron_fsvideo.models.dit.denoiser import Denoiser
from megatron_fsvideo.models.dit.model import DiTModel
from megatron_fsvideo.models.dit.tokens import patchify, unpatchify

__all__ = ["Denoiser", "DiTModel", "build_dit", "build_dit_chunks", "patchify", "transformer_config", "unpatchify"]
