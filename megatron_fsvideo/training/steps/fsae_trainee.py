"""What gradients flow through in one forward pass: the autoencoder, and in phase 4 the projection of its latents.

It is one module so that data parallelism wraps everything that is trained, and a phase's frozen part is decided here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_fsvideo.losses.latent_regularizers import LatentTransform
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE, PatchBox, VideoRegion, decode_patch, encode_sliced, encode_tiled
from megatron_fsvideo.models.fsae.context import DecodeContext
from megatron_fsvideo.models.fsae.frame_shards import FrameShards, shards_of
from megatron_fsvideo.models.fsae.model import noisy
from megatron_fsvideo.models.fsae.parameter_rules import convolutional_rule
from megatron_fsvideo.models.parameter_rules import UNDECAYED, ParameterRule, ParameterRules, classify
from megatron_fsvideo.training.steps.fsae_shares import ClipShare


class TraineeOutput(NamedTuple):
    """What the losses are computed from.

    Attributes:
        latents: [b, c, t, h, w], of the process's frames.
        reconstruction: [b, 3, f, H, W], or None when a transform replaces it; of `region` only.
        transformed: decoded from the transformed latents, or None without a transform.
        projected: latents [b, e, t, rows, columns] at the size of the vision features, or None.
        region: of the process's frames, what the reconstruction is of; None for all.
    """

    latents: Tensor
    reconstruction: Tensor | None
    transformed: Tensor | None
    projected: Tensor | None
    region: VideoRegion | None = None


class FSAETrainee(nn.Module):
    """The autoencoder in training.

    Args:
        trains_encoder: else the encoder is frozen, and its forward pass keeps nothing for a backward pass.
        projection: of the latents to the vision features, trained with them.
        tile, slice_latents: `FSAEMemoryConfig.encoder_tile`, `encoder_slice`.
    """

    def __init__(
        self,
        fsae: FSAE,
        trains_encoder: bool,
        projection: LatentProjection | None = None,
        *,
        tile: int = 0,
        slice_latents: int = 0,
    ) -> None:
        super().__init__()
        self.tile = tile
        self.slice_latents = slice_latents
        self.fsae = fsae
        self.trains_encoder = trains_encoder
        self.projection = projection
        fsae.encoder.requires_grad_(trains_encoder)

    def parameter_rules(self) -> ParameterRules:
        """How each parameter is trained. The projection serves a loss alone: it neither decays nor takes Muon."""

        def rule_of(owner: nn.Module, name: str) -> ParameterRule | None:
            return UNDECAYED if owner is self.projection else convolutional_rule(owner, name)

        return classify(self, rule_of)

    def forward(
        self,
        video: Tensor,
        latent_noise: Tensor | None = None,
        transform: LatentTransform | None = None,
        feature_size: tuple[int, int] | None = None,
        noise_seed: int = 0,
        box: PatchBox | None = None,
        share: ClipShare | None = None,
    ) -> TraineeOutput:
        """Encode a whole video [b, 3, f, h, w] and decode as the losses need it.

        Args:
            latent_noise: as `FSAE.forward` takes it.
            transform: of the latents, with role added or replacing.
            feature_size: rows and columns of the vision features; None projects nothing.
            noise_seed: of the noise inside a Standard or Lite decoder.
            box: what of this process's latents the decoder's outer stages see; None for all.
            share: which frames this process encodes and decodes; None for all.
        """
        shards = None if share is None else shards_of(share.group)
        mine = video if share is None else share.of(video)
        if not self.trains_encoder:
            with torch.no_grad():
                latents, features = self._encode(mine, shards), self.fsae.first_frame_features(video[:, :, :1])
            reconstruction, region = self._decode(latents, features, noise_seed, box, shards)
            return TraineeOutput(latents, reconstruction, None, None, region)
        latents = self._encode(mine, shards)
        reconstruction = transformed = projected = region = None
        if transform is None or transform.role != "replacing":
            disturbed = latents if latent_noise is None else noisy(latents, latent_noise)
            reconstruction, region = self._decode(disturbed, None, noise_seed, box, shards)
        if transform is not None:
            transformed = self.fsae.decode(transform.of_latents(latents))
        if feature_size is not None:
            assert self.projection is not None, "phase 4 has a projection"
            whole = latents if share is None else share.join_latents(latents)
            projected = self.projection(whole, feature_size)
        return TraineeOutput(latents, reconstruction, transformed, projected, region)

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """As generation decodes: with the first frame's features where the decoder takes them."""
        features = None if self.trains_encoder else self.fsae.first_frame_features(video[:, :, :1])
        return self.fsae.decode(self.fsae.encode(video), features)

    def _encode(self, frames: Tensor, shards: FrameShards | None) -> Tensor:
        if self.slice_latents:
            return encode_sliced(self.fsae, frames, self.slice_latents)
        if self.tile:
            return encode_tiled(self.fsae, frames, self.tile, shards)
        return self.fsae.encode(frames) if shards is None else self.fsae.encoder(frames, shards)

    def _decode(
        self,
        latents: Tensor,
        features: list[Tensor] | None,
        noise_seed: int,
        box: PatchBox | None,
        shards: FrameShards | None,
    ) -> tuple[Tensor, VideoRegion | None]:
        if box is not None:
            return decode_patch(self.fsae, latents, box, features, noise_seed, shards)
        if shards is None:
            return self.fsae.decode(latents, features, noise_seed), None
        return self.fsae.decoder(latents, DecodeContext(shards, features, None, noise_seed)), None
