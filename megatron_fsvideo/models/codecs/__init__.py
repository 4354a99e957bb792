"""Codecs: from video to latents as they are stored and back, for everyone who does not train the autoencoder."""

from megatron_fsvideo.models.codecs.codec import LatentCodec, ScaledCodec
from megatron_fsvideo.models.codecs.fsae import FSAECodec
from megatron_fsvideo.models.codecs.identity import CodecIdentity, is_same_encoder, spell_autoencoder
from megatron_fsvideo.models.codecs.scale import LatentScale

__all__ = [
    "CodecIdentity",
    "FSAECodec",
    "LatentCodec",
    "LatentScale",
    "ScaledCodec",
    "is_same_encoder",
    "spell_autoencoder",
]
