"""What the DiT learns from one micro-batch: draws, model input and the per-sample error (paper section 3).

Every number drawn belongs to (seed, sample, epoch, role), so all layouts and all restarts draw the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fsvideo.config import DiffusionConfig, DiTConfig
from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.diffusion.conditions import (
    build_model_input,
    first_frame_condition,
)
from megatron_fsvideo.diffusion.flow_matching import (
    add_noise,
    logit_normal_sigmas,
    to_timesteps,
    to_velocity,
    velocity_target,
)
from megatron_fsvideo.diffusion.losses import squared_errors
from megatron_fsvideo.models.dit import patchify
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.seeds import sample_generator
from megatron_fsvideo.parallel.sequence import local_slice, sum_for_same_loss


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch at its noise levels: the model's inputs and its target.

    Attributes:
        model_input: [b, 2c + m, t, h, w]. text: [b, l, e] or None. image: [b, n, e] or None.
        noisy_latents, target: [b, c, t, h, w]; the target is the velocity.
        sigmas: [b].
    """

    model_input: Tensor
    text: Tensor | None
    image: Tensor | None
    noisy_latents: Tensor
    target: Tensor
    sigmas: Tensor


def training_draws(batch: Batch, diffusion: DiffusionConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [b, c, t, h, w], noise levels [b] and which texts are dropped [b] for training."""
    shape = batch.latents.shape[1:]
    noise = [torch.randn(shape, generator=generator) for generator in _generators(batch, seed, "noise")]
    normals = [torch.randn((), generator=generator) for generator in _generators(batch, seed, "sigma")]
    dropped = [torch.rand((), generator=generator) for generator in _generators(batch, seed, "text_dropout")]
    sigmas = logit_normal_sigmas(
        torch.stack(normals),
        diffusion.sigma_mean,
        diffusion.sigma_std,
        diffusion.sigma_shift,
    )
    return torch.stack(noise), sigmas, torch.stack(dropped) < diffusion.text_dropout


def validation_draws(batch: Batch, diffusion: DiffusionConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for validation: the training's noise levels, no dropped text, the same draws every time."""
    shape = batch.latents.shape[1:]
    ids = [sample_generator(seed, int(number), 0, "validation") for number in batch.sample_ids]
    normals = torch.stack([torch.randn((), generator=generator) for generator in ids])
    sigmas = logit_normal_sigmas(normals, diffusion.sigma_mean, diffusion.sigma_std, diffusion.sigma_shift)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in ids])
    return noise, sigmas, torch.zeros(len(ids), dtype=torch.bool)


def hidden_first_frames(batch: Batch, diffusion: DiffusionConfig, seed: int) -> Tensor:
    """Whose first frame the model is not given in training: bool [b]. A clip of one frame would be its own answer."""
    drawn = [torch.rand((), generator=generator) for generator in _generators(batch, seed, "image_dropout")]
    return (torch.stack(drawn) < diffusion.image_dropout) | is_image(batch)


def is_image(batch: Batch) -> bool:
    """Whether the clips have one frame."""
    return batch.latents.shape[2] == 1


def make_noisy(
    batch: Batch,
    draws: tuple[Tensor, Tensor, Tensor],
    null_text: Tensor,
    model: DiTConfig,
    diffusion: DiffusionConfig,
    hidden: Tensor | None = None,
) -> NoisyBatch:
    """Put the draws on the batch.

    Args:
        null_text: the empty prompt's encoding [l, e], zero padded to the batch's length.
        hidden: bool [b], whose first frame is not given; None gives the first frame of all clips, but of images.
    """
    latents = batch.latents
    if hidden is None:
        hidden = torch.full((len(latents),), is_image(batch))
    hidden = hidden.to(latents.device)
    noise, sigmas, dropped = (tensor.to(latents.device) for tensor in draws)
    noisy = add_noise(latents, noise, sigmas)
    mask, condition = first_frame_condition(latents, model.mask_channels, diffusion.repeat_condition, hidden)
    text = torch.where(dropped[:, None, None], null_text.to(batch.text), batch.text)
    return NoisyBatch(
        model_input=build_model_input(noisy, mask, condition),
        text=text if model.text_embed_dim else None,
        # Zeros, not None: every weight takes part in every step, as overlapped gradient reduction needs.
        image=batch.image.masked_fill(hidden[:, None, None], 0) if model.image_embed_dim else None,
        noisy_latents=noisy,
        target=velocity_target(latents, noise),
        sigmas=sigmas,
    )


def predict(model: torch.nn.Module, noisy: NoisyBatch) -> Tensor:
    """Run the model: the prediction's tokens on the last stage, what the next stage receives elsewhere."""
    return model(noisy.model_input, to_timesteps(noisy.sigmas), noisy.text, noisy.image)


def velocity_mse(
    prediction: Tensor,
    noisy: NoisyBatch,
    model: DiTConfig,
    diffusion: DiffusionConfig,
    pgs: ProcessGroups,
) -> Tensor:
    """Mean squared velocity error of each whole sample [b], fp32.

    The squares are summed over the context-parallel ranks before anything non-linear is done with them: a loss with a
    root averaged over the ranks' parts would be another loss (dit_spec 3.3).

    Args:
        prediction: this context-parallel rank's tokens [b, n, c * patch volume].
    """
    mine = [local_slice(patchify(x, model.patch_size), 1, pgs.cp) for x in (noisy.noisy_latents, noisy.target)]
    velocity = to_velocity(prediction, mine[0], noisy.sigmas, diffusion.prediction_type)
    total = sum_for_same_loss(squared_errors(velocity, mine[1]), pgs.cp)
    return total / noisy.target[0].numel()


def pad_rows(text: Tensor, length: int) -> Tensor:
    """Zero rows after text [l, e], to `length` rows."""
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


def _generators(batch: Batch, seed: int, role: str) -> list[torch.Generator]:
    pairs = zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
    return [sample_generator(seed, number, epoch, role) for number, epoch in pairs]
