"""The DiT as the velocity of the flow: the one way in for training, validation, sampling and distillation.

**Gradients.** They reach the noisy latents and the condition's latents under every layout without pipeline stages, also
through frozen weights. Tensor-parallel ranks hold the same tensors and must all compute the same loss. What
context-parallel ranks must compute differs:

| method | a rank's tensors | losses of the context-parallel ranks | input gradient on each rank |
|---|---|---|---|
| `local_velocity` | its own tokens | each that of its own tokens; the loss is their sum | of its own tokens |
| `velocity` | whole latents | all the same | of the whole latents |

Letters: b samples, c latent channels, t h w latent frames, rows and columns, n tokens of this context-parallel rank,
p the patch's volume.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fsvideo.diffusion.conditions import Condition
from megatron_fsvideo.diffusion.flow_matching import to_timesteps, to_velocity
from megatron_fsvideo.models.dit.embeddings import Context
from megatron_fsvideo.models.dit.model import DiTModel
from megatron_fsvideo.models.dit.tokens import Grid, local_tokens, token_grid, unpatchify
from megatron_fsvideo.parallel.sequence import gather_tokens


@dataclass(frozen=True)
class EmbeddedCondition:
    """A condition in the form in which each call of the model takes it: a sampler makes it once.

    Attributes:
        tokens: this rank's tokens of mask and condition latents [b, n, (m + c) * p].
        grid: tokens of the whole clip along (t, h, w).
        text, image: embedded rows; None where the model has no such attention.
    """

    tokens: Tensor
    grid: Grid
    text: Context | None
    image: Context | None


class Denoiser:
    """A model and what its output means.

    Args:
        model: this rank's part. With pipeline stages only `predict` and `to_local_velocity` may be called.
        prediction_type: "velocity", or "sample" for a model that puts out clean latents.
    """

    def __init__(self, model: DiTModel, prediction_type: str) -> None:
        self.model = model
        self.prediction_type = prediction_type
        self.pgs = model.pgs
        self.patch_size = model.model_config.patch_size

    def local_tokens(self, latents: Tensor) -> Tensor:
        """This rank's tokens [b, n, c * p] of whole latents [b, c, t, h, w]."""
        return local_tokens(latents, self.patch_size, self.pgs.cp)

    def predict(self, noisy_latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """Run the model's part on this stage.

        Args:
            noisy_latents: whole latents [b, c, t, h, w] at noise levels `sigmas` [b].

        Returns:
            on the last stage the prediction for this rank's tokens [b, n, c * p]; elsewhere what the next stage
            receives.
        """
        return self.model(condition.model_input(noisy_latents), to_timesteps(sigmas), condition.text, condition.image)

    def to_local_velocity(self, prediction: Tensor, noisy_tokens: Tensor, sigmas: Tensor) -> Tensor:
        """The velocity [b, n, c * p] that a prediction for this rank's noisy tokens [b, n, c * p] stands for."""
        return to_velocity(prediction, noisy_tokens, sigmas, self.prediction_type)

    def embed_conditions(self, condition: Condition) -> EmbeddedCondition:
        """Embed the part of a condition that is the same at every noise level."""
        return EmbeddedCondition(
            self.local_tokens(condition.channels),
            token_grid(tuple(condition.latents.shape[2:]), self.patch_size),
            *self.model.embed_contexts(condition.text, condition.image),
        )

    def local_velocity(self, noisy_tokens: Tensor, sigmas: Tensor, condition: EmbeddedCondition) -> Tensor:
        """Velocity of this rank's tokens [b, n, c * p] from its noisy tokens [b, n, c * p] at noise levels [b].

        Unrolled sampling steps and losses of single tokens need no other rank's velocity.
        """
        tokens = torch.cat([noisy_tokens, condition.tokens], dim=-1)
        prediction = self.model.forward_tokens(
            tokens, condition.grid, to_timesteps(sigmas), condition.text, condition.image
        )
        return self.to_local_velocity(prediction, noisy_tokens, sigmas)

    def velocity(self, noisy_latents: Tensor, sigmas: Tensor, condition: Condition | EmbeddedCondition) -> Tensor:
        """Velocity [b, c, t, h, w] of whole latents [b, c, t, h, w] at noise levels [b], on every rank."""
        if isinstance(condition, Condition):
            condition = self.embed_conditions(condition)
        tokens = self.local_velocity(self.local_tokens(noisy_latents), sigmas, condition)
        return unpatchify(gather_tokens(tokens, 1, self.pgs.cp), condition.grid, self.patch_size)

    def under(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """(noisy latents, sigmas) -> velocity under one condition, which is embedded once: what a sampler takes."""
        embedded = self.embed_conditions(condition)
        return lambda noisy_latents, sigmas: self.velocity(noisy_latents, sigmas, embedded)
