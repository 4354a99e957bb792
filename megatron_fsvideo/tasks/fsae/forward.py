"""The forward pass of the trained modules: the autoencoder, and in phase 4 the projection of its latents."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEMemoryConfig
from megatron_fsvideo.losses.latent_regularizers import LatentTransform
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE, PatchBox, VideoRegion, decode_patch, encode_sliced, encode_tiled
from megatron_fsvideo.models.fsae.context import DecodeContext, NoiseSeed
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.models.fsae.model import noisy


class ForwardOutput(NamedTuple):
    """The tensors from which the losses are computed.

    Attributes:
        latents: latents [b, c, t, h, w] of the process's frames.
        reconstruction: video [b, 3, f, H, W] of `region`; None if a transform replaces it.
        transformed: video decoded from the transformed latents; None without a transform.
        projected: projected latents [b, e, t, rows, columns] at the size of the vision features, or None.
        region: part of the process's frames that the reconstruction covers; None for all.
    """

    latents: Tensor
    reconstruction: Tensor | None
    transformed: Tensor | None
    projected: Tensor | None
    region: VideoRegion | None = None


class FSAEForward:
    """The forward pass of a phase.

    Args:
        trains_encoder: False freezes the encoder: its forward pass then keeps nothing for a backward pass.
        projection: module that maps latents to vision features, trained with the autoencoder.
    """

    def __init__(
        self,
        fsae: FSAE,
        trains_encoder: bool,
        projection: LatentProjection | None = None,
        memory: FSAEMemoryConfig | None = None,
    ) -> None:
        self.fsae = fsae
        self.trains_encoder = trains_encoder
        self.projection = projection
        self.memory = memory or FSAEMemoryConfig()
        fsae.encoder.requires_grad_(trains_encoder)

    def __call__(
        self,
        video: Tensor,
        latent_noise: Tensor | None = None,
        transform: LatentTransform | None = None,
        feature_size: tuple[int, int] | None = None,
        noise_seed: NoiseSeed = 0,
        box: PatchBox | None = None,
        shards: FrameShards | None = None,
    ) -> ForwardOutput:
        """Encode a whole video [b, 3, f, h, w] and decode as the losses need it.

        Args:
            latent_noise: noise for the latents, as in `FSAE.forward`.
            transform: transform of the latents. Its role says whether it adds a reconstruction or replaces it.
            feature_size: rows and columns of the vision features; None projects nothing.
            noise_seed: seed of the noise inside a Standard or Lite decoder.
            box: part of this process's latents that the decoder's outer stages see; None for all.
            shards: frames that this process encodes and decodes; None for all.
        """
        mine = video if shards is None else shards.of(video)
        if not self.trains_encoder:
            with torch.no_grad():
                latents, features = self._encode(mine, shards), self.fsae.first_frame_features(video[:, :, :1])
            reconstruction, region = self._decode(latents, features, noise_seed, box, shards)
            return ForwardOutput(latents, reconstruction, None, None, region)
        latents = self._encode(mine, shards)
        reconstruction = transformed = projected = region = None
        if transform is None or transform.role != "replacing":
            disturbed = latents if latent_noise is None else noisy(latents, latent_noise)
            reconstruction, region = self._decode(disturbed, None, noise_seed, box, shards)
        if transform is not None:
            transformed = self.fsae.decode(transform.of_latents(latents))
        if feature_size is not None:
            assert self.projection is not None, "phase 4 has a projection"
            whole = latents if shards is None else shards.join_latents(latents)
            projected = self.projection(whole, feature_size)
        return ForwardOutput(latents, reconstruction, transformed, projected, region)

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """Encode and decode a video as generation does, with the first frame's features if the decoder takes them."""
        features = None if self.trains_encoder else self.fsae.first_frame_features(video[:, :, :1])
        return self.fsae.decode(self.fsae.encode(video), features)

    def _encode(self, frames: Tensor, shards: FrameShards | None) -> Tensor:
        if self.memory.encoder_slice:
            return encode_sliced(self.fsae, frames, self.memory.encoder_slice)
        if self.memory.encoder_tile:
            return encode_tiled(self.fsae, frames, self.memory.encoder_tile, shards)
        return self.fsae.encode(frames) if shards is None else self.fsae.encoder(frames, shards)

    def _decode(
        self,
        latents: Tensor,
        features: list[Tensor] | None,
        noise_seed: NoiseSeed,
        box: PatchBox | None,
        shards: FrameShards | None,
    ) -> tuple[Tensor, VideoRegion | None]:
        if box is not None:
            return decode_patch(self.fsae, latents, box, features, noise_seed, shards)
        if shards is None:
            return self.fsae.decode(latents, features, noise_seed), None
        return self.fsae.decoder(latents, DecodeContext(shards, features, None, noise_seed)), None
