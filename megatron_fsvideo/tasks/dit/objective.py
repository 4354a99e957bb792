"""The DiT's objective for one micro-batch: random draws, condition and error of each sample (paper section 3).

Every random number depends on (seed, sample, epoch, role), so that all layouts and restarts draw the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_fsvideo.config import DiffusionConfig, DiTConfig, DiTJob
from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.data.stored_batch import StoredBatch
from megatron_fsvideo.diffusion.conditions import Condition, first_frame_condition
from megatron_fsvideo.diffusion.flow_matching import (
    add_noise,
    logit_normal_sigmas,
    velocity_target,
    white_latents_bound,
)
from megatron_fsvideo.diffusion.losses import loss_of_mse, squared_errors
from megatron_fsvideo.models.dit import Denoiser
from megatron_fsvideo.parallel.seeds import sample_generator
from megatron_fsvideo.parallel.sequence import sum_for_same_loss

NUM_SIGMA_BINS = 4

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch with noise: the model's inputs and its target.

    Attributes:
        noisy_latents, target: [b, c, t, h, w]; the target is the velocity.
        sigmas: noise levels [b].
    """

    noisy_latents: Tensor
    sigmas: Tensor
    condition: Condition
    target: Tensor


class DiTObjective:
    """The forward steps of training and validation, as Megatron's schedule takes them.

    Args:
        null_text: the empty prompt's encoding [l, e], zero padded to the batches' length.

    Attributes:
        errors: on the last stage, sample ids and velocity errors of the micro-batches since the list was cleared.
    """

    def __init__(self, job: DiTJob, null_text: Tensor, device: torch.device) -> None:
        self.job = job
        self.null_text = null_text
        self.device = device
        self.errors: list[tuple[Tensor, Tensor]] = []

    def training_step(
        self, iterator: Iterator[StoredBatch], wrapped: DistributedDataParallel
    ) -> tuple[Tensor, LossFunction]:
        """Return the prediction, and a function of it that gives the loss, with loss and error as `sums` [2]."""
        batch = next(iterator).to(self.device)
        diffusion, seed = self.job.diffusion, self.job.training.seed
        denoiser = Denoiser(wrapped.module, diffusion.prediction_type)
        hidden = hidden_first_frames(batch, diffusion, seed)
        noisy = self._make_noisy(batch, training_draws(batch, diffusion, seed), hidden)

        def loss_function(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mse = velocity_mse(prediction, noisy, denoiser)
            loss = loss_of_mse(mse, noisy.target[0].numel(), diffusion.loss_type, diffusion.huber_c).mean()
            self.errors.append((batch.sample_ids, mse.detach()))
            # A copy, because the schedule scales the loss in place.
            return loss, {"sums": torch.stack([loss.detach(), mse.detach().mean()])}

        return denoiser.predict(noisy.noisy_latents, noisy.sigmas, noisy.condition), loss_function

    def validation_step(
        self, iterator: Iterator[StoredBatch], wrapped: DistributedDataParallel
    ) -> tuple[Tensor, LossFunction]:
        """Return the prediction, and a function of it that sums errors, bounds, samples: `sums` [3, noise levels]."""
        batch = next(iterator).to(self.device)
        denoiser = Denoiser(wrapped.module, self.job.diffusion.prediction_type)
        noisy = self._make_noisy(batch, validation_draws(batch, self.job.diffusion, self.job.training.seed), None)

        def loss_function(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mse = velocity_mse(prediction, noisy, denoiser)
            values = torch.stack([mse, white_latents_bound(noisy.sigmas), torch.ones_like(mse)]).double()  # (3, b)
            bins = (noisy.sigmas * NUM_SIGMA_BINS).long().clamp(max=NUM_SIGMA_BINS - 1)
            return mse.mean(), {"sums": values.new_zeros(3, NUM_SIGMA_BINS).index_add_(1, bins, values)}

        return denoiser.predict(noisy.noisy_latents, noisy.sigmas, noisy.condition), loss_function

    def broken_samples(self) -> set[int]:
        """Ids of this rank's samples whose error is not finite."""
        return {key for ids, errors in self.errors for key in ids[~errors.isfinite()].tolist()}

    def _make_noisy(self, batch: Batch, draws: tuple[Tensor, Tensor, Tensor], hidden: Tensor | None) -> NoisyBatch:
        return make_noisy(batch, draws, self.null_text, self.job.model, self.job.diffusion, hidden)


def training_draws(batch: Batch, diffusion: DiffusionConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise [b, c, t, h, w], noise levels [b] and the mask of dropped texts [b] for training."""
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
    """Fixed draws of a validation batch: noise, the noise levels of training, and no dropped text."""
    shape = batch.latents.shape[1:]
    ids = [sample_generator(seed, int(number), 0, "validation") for number in batch.sample_ids]
    normals = torch.stack([torch.randn((), generator=generator) for generator in ids])
    sigmas = logit_normal_sigmas(normals, diffusion.sigma_mean, diffusion.sigma_std, diffusion.sigma_shift)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in ids])
    return noise, sigmas, torch.zeros(len(ids), dtype=torch.bool)


def hidden_first_frames(batch: Batch, diffusion: DiffusionConfig, seed: int) -> Tensor:
    """Mask [b] of samples whose first frame is hidden. Images are always hidden: the condition would be the target."""
    drawn = [torch.rand((), generator=generator) for generator in _generators(batch, seed, "image_dropout")]
    return (torch.stack(drawn) < diffusion.image_dropout) | batch.is_image


def make_noisy(
    batch: Batch,
    draws: tuple[Tensor, Tensor, Tensor],
    null_text: Tensor,
    model: DiTConfig,
    diffusion: DiffusionConfig,
    hidden: Tensor | None = None,
) -> NoisyBatch:
    """Apply noise and conditions to a batch.

    Args:
        null_text: the empty prompt's encoding [l, e], zero padded to the batch's length.
        hidden: mask bool [b] of samples whose first frame is hidden; None hides it for images only.
    """
    latents = batch.latents
    if hidden is None:
        hidden = torch.full((len(latents),), batch.is_image)
    noise, sigmas, dropped = (tensor.to(latents.device) for tensor in draws)
    text = torch.where(dropped[:, None, None], null_text.to(batch.text), batch.text)
    condition = first_frame_condition(
        latents, model.mask_channels, text, batch.image, repeat=diffusion.repeat_condition, hidden=hidden
    )
    return NoisyBatch(add_noise(latents, noise, sigmas), sigmas, condition, velocity_target(latents, noise))


def velocity_mse(prediction: Tensor, noisy: NoisyBatch, denoiser: Denoiser) -> Tensor:
    """Mean squared velocity error of each whole sample [b], fp32.

    The squares are summed over the context-parallel ranks before any non-linear function of them: the root of a sum
    over all tokens differs from the mean of the roots over each rank's tokens.

    Args:
        prediction: result of `denoiser.predict` for this context-parallel rank's tokens.
    """
    noisy_tokens, target = (denoiser.local_tokens(x) for x in (noisy.noisy_latents, noisy.target))
    velocity = denoiser.to_local_velocity(prediction, noisy_tokens, noisy.sigmas)
    total = sum_for_same_loss(squared_errors(velocity, target), denoiser.pgs.cp)
    return total / noisy.target[0].numel()


def pad_rows(text: Tensor, length: int) -> Tensor:
    """Pad text [l, e] with zero rows to `length` rows."""
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


def _generators(batch: Batch, seed: int, role: str) -> list[torch.Generator]:
    pairs = zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True)
    return [sample_generator(seed, number, epoch, role) for number, epoch in pairs]
