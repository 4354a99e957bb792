"""What gradients flow through in one forward pass: the autoencoder, and in phase 4 the projection of its latents.

It is one module so that data parallelism wraps everything that is trained, and a phase's frozen part is decided here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_fsvideo.losses.latent_regularizers import LatentTransform
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE


class TraineeOutput(NamedTuple):
    """What the losses are computed from.

    Attributes:
        latents: [b, c, t, h, w].
        reconstruction: [b, 3, f, H, W], or None when a transform replaces it.
        transformed: decoded from the transformed latents, or None without a transform.
        projected: latents [b, e, t, rows, columns] at the size of the vision features, or None.
    """

    latents: Tensor
    reconstruction: Tensor | None
    transformed: Tensor | None
    projected: Tensor | None


class FSAETrainee(nn.Module):
    """The autoencoder in training.

    Args:
        trains_encoder: else the encoder is frozen, and its forward pass keeps nothing for a backward pass.
        projection: of the latents to the vision features, trained with them.
    """

    def __init__(self, fsae: FSAE, trains_encoder: bool, projection: LatentProjection | None = None) -> None:
        super().__init__()
        self.fsae = fsae
        self.trains_encoder = trains_encoder
        self.projection = projection
        fsae.encoder.requires_grad_(trains_encoder)

    def forward(
        self,
        video: Tensor,
        latent_noise: Tensor | None = None,
        transform: LatentTransform | None = None,
        feature_size: tuple[int, int] | None = None,
        noise_seed: int = 0,
    ) -> TraineeOutput:
        """Encode video [b, 3, f, h, w] and decode as the losses need it.

        Args:
            latent_noise: as `FSAE.forward` takes it.
            transform: of the latents, with role added or replacing.
            feature_size: rows and columns of the vision features; None projects nothing.
            noise_seed: of the noise inside a Standard or Lite decoder.
        """
        if not self.trains_encoder:
            latents, features = self._frozen_encoding(video)
            return TraineeOutput(latents, self.fsae.decode(latents, features, noise_seed), None, None)
        transformed = projected = None
        if transform is not None and transform.role == "replacing":
            reconstruction, latents = None, self.fsae.encode(video)
        else:
            reconstruction, latents = self.fsae(video, latent_noise)
        if transform is not None:
            transformed = self.fsae.decode(transform.of_latents(latents))
        if feature_size is not None:
            assert self.projection is not None, "phase 4 has a projection"
            projected = self.projection(latents, feature_size)
        return TraineeOutput(latents, reconstruction, transformed, projected)

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """As generation decodes: with the first frame's features where the decoder takes them."""
        if self.trains_encoder:
            return self.fsae(video)[0]
        return self.fsae.decode(*self._frozen_encoding(video))

    @torch.no_grad()
    def _frozen_encoding(self, video: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.fsae.encode(video), self.fsae.first_frame_features(video[:, :, :1])
