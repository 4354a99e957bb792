"""The discriminator's side of GAN training: its weights, optimizer, R1 schedule and what of it a checkpoint keeps."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEJob
from megatron_fsvideo.losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum
from megatron_fsvideo.parallel.seeds import derive_seed
from megatron_fsvideo.training.fsae_optimizer import FSAEOptimizer


class Adversary:
    """The discriminator and how it learns.

    It has the autoencoder's learning rate, AdamW betas and schedule, neither weight decay nor clipping: with R1 only in
    every n-th step, n times as large, clipping would undo it.
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups) -> None:
        self.config = job.adversary
        self.bf16 = job.training.bf16
        self.pgs = pgs
        torch.manual_seed(derive_seed(job.training.seed, "discriminator"))
        self.model = Discriminator(
            self.config.discriminator_width, self.config.discriminator_scales, self.config.discriminator_layers
        ).to(pgs.device)
        optimizer = replace(job.optimizer, optimizer="adam", weight_decay=0.0, clip_grad=0.0)
        sharers = pgs.dp_cp if job.parallel.use_distributed_optimizer else None
        self.optimizer = FSAEOptimizer(self.model, optimizer, job.training.train_iters, sharers)

    def learns_alone(self, iteration: int) -> bool:
        """Whether the autoencoder rests in the step after `iteration` steps."""
        return iteration < self.config.discriminator_warmup_iters

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """The adversarial loss of reconstructions [b, 3, f, h, w], whose gradient passes through the frozen weights."""
        self.model.requires_grad_(False)
        with self._autocast():
            return generator_loss(self.model(_wide(reconstruction)))

    def backward(self, video: Tensor, reconstruction: Tensor, iteration: int, weight: float) -> dict[str, Tensor]:
        """Add the discriminator's gradients of one micro-batch, weighted; returns the parts of its loss."""
        self.model.requires_grad_(True)
        with self._autocast():
            fake = self.model(_wide(reconstruction.detach()))
            if self.config.r1_gamma == 0 or iteration % self.config.r1_interval:
                loss = discriminator_loss(self.model(video), fake)
                (loss * weight).backward()
                return {"discriminator": loss.detach()}
        # Second derivatives are taken in fp32.
        real_video = video.detach().requires_grad_(True)
        real = self.model(real_video)
        penalty = r1_penalty(real_video, real)
        loss = discriminator_loss(real, fake)
        # One backward pass for both: R1 alone gives the last biases no gradient.
        scale = self.config.r1_gamma / 2 * self.config.r1_interval
        ((loss + scale * penalty) * weight).backward()
        return {"discriminator": loss.detach(), "r1": penalty.detach()}

    def step(self, iteration: int) -> float:
        """Average the gradients over all ranks that hold copies and update; returns their norm."""
        if self.pgs.dp_cp_size > 1:
            self._average_gradients()
        grad_norm, _ = self.optimizer.step(iteration)
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state."""
        return {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over a discriminator.

        Raises:
            ValueError: of another architecture.
        """
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if found != expected:
            name = next(name for name in sorted(set(found) | set(expected)) if found.get(name) != expected.get(name))
            raise ValueError(
                f"the saved discriminator differs in {name}: {found.get(name)} there, {expected.get(name)} here; give "
                "its discriminator_width, discriminator_scales and discriminator_layers"
            )
        self.model.load_state_dict(weights)

    def _autocast(self) -> torch.autocast:
        # torch 2.13 on CPU: the bf16 weight gradient of a Conv3d with fewer frames than its kernel is not initialised.
        device = self.pgs.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16 and device != "cpu")

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        all_reduce_sum(flat, self.pgs.dp_cp)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.pgs.dp_cp_size)


def _wide(video: Tensor) -> Tensor:
    """At least fp32: a bf16 decoder's video meets fp32 weights where there is no autocast."""
    return video.to(torch.promote_types(video.dtype, torch.float32))
