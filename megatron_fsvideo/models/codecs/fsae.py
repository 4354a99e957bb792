"""The video autoencoder as a codec, whose memory does not grow with the length of the video.

The encoder and the causal and Lite decoders go through a video in slices of time, with the result of one call. A
Standard decoder sees both ways in time: its tiles overlap and are blended.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from megatron_fsvideo.models.codecs.codec import ScaledCodec
from megatron_fsvideo.models.codecs.identity import CodecIdentity, fingerprint
from megatron_fsvideo.models.codecs.scale import LatentScale
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.tiling import Tiling, decode_frames, encode_frames

PIXELS_PER_SLICE = 2**22
"""Pixels x frames x samples that go through at once. At the published size they take 13 GiB in bf16 to encode and 7 GiB
to decode with Lite, weights included."""
MIN_TILE = 3
"""Latent frames of a Standard decoder's tile at least: with fewer, none would be decoded once only."""


class FSAECodec:
    """A frozen FSAE behind the interface `LatentCodec`. Gradients flow to its inputs if the caller enables them.

    Attributes:
        tiling: how slices and tiles are cut; None cuts at `PIXELS_PER_SLICE`.

    Args:
        fsae: with frozen weights, wherever they are: inputs are moved there.
        identity: of the stored weights, where `fsae` holds them rounded; None: those of `fsae` itself.
    """

    def __init__(self, fsae: FSAE, identity: CodecIdentity | None = None, tiling: Tiling | None = None) -> None:
        self.fsae, self._identity = fsae, identity
        self.compression = fsae.config.compression
        self.latent_channels = fsae.latent_channels
        self.tiling = tiling

    @property
    def identity(self) -> CodecIdentity:
        """Fingerprints of the stored weights: the encoder's and those of all weights."""
        if self._identity is None:
            self._identity = CodecIdentity(fingerprint(self.fsae.encoder), fingerprint(self.fsae))
        return self._identity

    def with_scale(self, scale: LatentScale) -> ScaledCodec:
        """Return a codec of latents that are normalised with this mean and deviation."""
        return ScaledCodec(self, scale)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FSAECodec":
        """Move the weights, and round them once their identity is known; returns this codec."""
        if dtype is not None:
            self._identity = self.identity
        self.fsae.to(device, dtype)
        return self

    def encode(self, video: Tensor) -> Tensor:
        """Encode a whole video [b, 3, f, H, W] to latents [b, c, t, h, w], with the memory of a slice.

        Raises:
            ValueError: frames not 4k+1, or sides that are not multiples of the spatial factor.
        """
        self.fsae.check_whole_video(video)
        batch, _, frames, height, width = video.shape
        if self.tiling is None and self._latents_per_slice(batch, height, width) * self.compression.temporal >= frames:
            return self.fsae.encode(self._place(video))
        # Where not even one latent of all samples fits, fewer samples go through at once.
        samples = max(1, PIXELS_PER_SLICE // (self.compression.temporal * height * width))
        return torch.cat([torch.cat(list(self.encode_stream([part])), dim=2) for part in video.split(samples)])

    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a video that comes in parts [b, 3, any, H, W]; yields its latents in parts (`LatentCodec`)."""
        first, frames = _peek(frames)
        tiling = self.tiling or Tiling(self._latents_per_slice(len(first), *first.shape[-2:]), 0)
        # Cut before they are moved, so that a long part stays where it is.
        pieces = (piece for part in frames for piece in part.split(tiling.frames * self.compression.temporal, dim=2))
        yield from encode_frames(self.fsae, map(self._place, pieces), tiling)

    def decode(self, latents: Tensor, first_frame: Tensor | None = None, noise_seed: int = 0) -> Tensor:
        """Decode latents [b, c, t, h, w] to a whole video [b, 3, f, H, W], with the memory of a slice or tile.

        Raises:
            ValueError: another number of channels, or a first frame of another size.
        """
        return torch.cat(list(self.decode_stream([latents], first_frame, noise_seed)), dim=2)

    def decode_stream(
        self, latents: Iterable[Tensor], first_frame: Tensor | None = None, noise_seed: int = 0
    ) -> Iterator[Tensor]:
        """Decode latents that come in parts [b, c, any, h, w]; yields the video in parts (`LatentCodec`)."""
        first, latents = _peek(map(self._place, latents))
        features = self._first_frame_features(first[:, :, :1], first_frame, noise_seed)
        tiling = self.tiling or self._decoder_tiling(first)
        yield from decode_frames(self.fsae, latents, features, noise_seed, tiling)

    def _first_frame_features(
        self, first_latent: Tensor, first_frame: Tensor | None, noise_seed: int
    ) -> Sequence[Tensor] | None:
        """The first frame's encoder features, to which the decoder attends; None for a causal decoder."""
        if self.fsae.config.decoder == "causal":
            return None
        if first_frame is None:
            first_frame = self.fsae.decode(first_latent, None, noise_seed).clamp(-1, 1)
        return self.fsae.first_frame_features(self._place(first_frame))

    def _decoder_tiling(self, latents: Tensor) -> Tiling:
        height, width = (side * self.compression.spatial for side in latents.shape[-2:])
        size = self._latents_per_slice(len(latents), height, width)
        if self.fsae.decoder.streams:
            return Tiling(size, 0)
        size = max(MIN_TILE, size)
        return Tiling(size, size // MIN_TILE)

    def _latents_per_slice(self, batch: int, height: int, width: int) -> int:
        return max(1, PIXELS_PER_SLICE // (batch * height * width * self.compression.temporal))

    def _place(self, tensor: Tensor) -> Tensor:
        weight = next(self.fsae.parameters())
        return tensor.to(weight.device, weight.dtype)


def _peek(parts: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first part, and an iterator over all parts including the first."""
    iterator = iter(parts)
    first = next(iterator)
    return first, chain([first], iterator)
