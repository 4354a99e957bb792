"""Interface of an autoencoder for generation, preprocessing and evaluation.

Shapes: video [b, 3, f, H, W] in [-1, 1] with f = 4k+1; latents [b, c, k+1, H / s, W / s] with the spatial factor s.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from megatron_fsvideo.config import Compression
from megatron_fsvideo.models.codecs.identity import CodecIdentity
from megatron_fsvideo.models.codecs.scale import LatentScale


class LatentCodec(Protocol):
    """Encodes video to latents as they are stored, not normalised, and decodes them. Inputs may lie on any device.

    Attributes:
        compression: factors between pixels and latents, legal sizes and the latents' shape.
        latent_channels: c.
        identity: whose latents they are.
    """

    compression: Compression
    latent_channels: int
    identity: CodecIdentity

    def encode(self, video: Tensor) -> Tensor:
        """Encode a whole video to latents, with the memory of a slice."""

    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video that comes in parts [b, 3, any, H, W]; yields its latents in parts.

        The last frame is repeated until there are 4k+1.
        """

    def decode(self, latents: Tensor, first_frame: Tensor | None = None, noise_seed: int = 0) -> Tensor:
        """Decode latents to a whole video, with the memory of a slice or tile beside the result.

        The arguments are those of `decode_stream`.
        """

    def decode_stream(
        self, latents: Iterable[Tensor], first_frame: Tensor | None = None, noise_seed: int = 0
    ) -> Iterator[Tensor]:
        """Decode latents that come in parts [b, c, any, h, w]; yields the video in parts.

        Args:
            first_frame: [b, 3, 1, H, W] in [-1, 1], for decoders that attend to it. None uses what the first latent
                decodes to.
            noise_seed: seed of the noise that a decoder adds.
        """


class ScaledCodec:
    """A codec of normalised latents in fp32. Their scale is that of a dataset or of a checkpoint's data.

    Args:
        codec: the codec of latents as they are stored.
    """

    def __init__(self, codec: LatentCodec, scale: LatentScale) -> None:
        self.codec, self.scale = codec, scale

    def encode(self, video: Tensor) -> Tensor:
        """Encode a whole video to normalised latents."""
        return self.scale.normalize(self.codec.encode(video).float())

    def decode(self, latents: Tensor, first_frame: Tensor | None = None, noise_seed: int = 0) -> Tensor:
        """Decode normalised latents to a whole video. The arguments are those of `LatentCodec.decode_stream`."""
        return self.codec.decode(self.scale.restore(latents), first_frame, noise_seed)

    def decode_stream(
        self, latents: Tensor, first_frame: Tensor | None = None, noise_seed: int = 0
    ) -> Iterator[Tensor]:
        """Decode normalised latents; yields the video in parts. Arguments: see `LatentCodec.decode_stream`."""
        return self.codec.decode_stream([self.scale.restore(latents)], first_frame, noise_seed)
