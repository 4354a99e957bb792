"""The video autoencoder (paper section 2.2): encoder; causal, Standard, Lite decoders; streams, tiles, patches."""

from megatron_fsvideo.models.fsae.inflation import begin_video
from megatron_fsvideo.models.fsae.model import FSAE
from megatron_fsvideo.models.fsae.patch import PatchBox, VideoRegion, decode_patch, draw_box
from megatron_fsvideo.models.fsae.phases import inherit
from megatron_fsvideo.models.fsae.sliced_encoder import encode_sliced
from megatron_fsvideo.models.fsae.streaming import StreamCache
from megatron_fsvideo.models.fsae.tiled_encoder import encode_tiled

__all__ = [
    "FSAE",
    "PatchBox",
    "StreamCache",
    "VideoRegion",
    "begin_video",
    "decode_patch",
    "draw_box",
    "encode_sliced",
    "encode_tiled",
    "inherit",
]
