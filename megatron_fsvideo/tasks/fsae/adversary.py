"""The discriminator in GAN training: its network, and the gradients of its loss with the R1 penalty."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEJob, to_dict
from megatron_fsvideo.losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.seeds import derive_seed
from megatron_fsvideo.training.network import TrainedNetwork, plain_config


class Adversary:
    """The discriminator with its training.

    The discriminator has the autoencoder's learning rate, AdamW betas and schedule, and no weight decay. Its gradients
    are not clipped: R1 comes only in every n-th step, n times as large, and clipping would remove that factor.

    Attributes:
        network: the trained network `discriminator`.

    Args:
        network_type: the class of the network, from `FSAELearner`.
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups, network_type: type[TrainedNetwork] = TrainedNetwork) -> None:
        self.config = job.adversary
        torch.manual_seed(derive_seed(job.training.seed, "discriminator"))
        sizes = (self.config.discriminator_width, self.config.discriminator_scales, self.config.discriminator_layers)
        self.model = Discriminator(*sizes).to(pgs.device)
        settings = replace(job.optimizer, optimizer="adam", weight_decay=0.0, clip_grad=0.0, ema_decay=0.0)
        record = {"kind": "discriminator", "model": to_dict(self.config), "bf16": False}
        rules = fsae_parameter_rules(self.model)
        self.network = network_type(
            "discriminator", [self.model], plain_config(), rules, settings, job.parallel, job.training, pgs, record
        )
        # torch 2.13 on CPU: the bf16 weight gradient of a Conv3d with fewer frames than its kernel is not initialised.
        self._device = pgs.device.type
        self._has_autocast = job.training.bf16 and self._device != "cpu"

    def learns_alone(self, iteration: int) -> bool:
        """Whether only the discriminator is trained in the step after `iteration` steps."""
        return iteration < self.config.discriminator_warmup_iters

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """Adversarial loss of reconstructions [b, 3, f, h, w]; run it and its backward pass in `network.frozen()`."""
        with self._autocast():
            return generator_loss(self.model(_wide(reconstruction)))

    def backward(
        self, video: Tensor, reconstruction: Tensor, iteration: int, weight: float, is_last: bool
    ) -> dict[str, Tensor]:
        """Add the discriminator's gradients of one micro-batch, and return the parts of its loss.

        Args:
            weight, is_last: the arguments of `TrainedNetwork.backward`.
        """
        with self._autocast():
            fake = self.model(_wide(reconstruction.detach()))
            if self.config.r1_gamma == 0 or iteration % self.config.r1_interval:
                loss = discriminator_loss(self.model(video), fake)
                self.network.backward(loss, weight, is_last)
                return {"discriminator": loss.detach()}
        # R1 needs second derivatives, which are computed in fp32.
        real_video = video.detach().requires_grad_(True)
        real = self.model(real_video)
        penalty = r1_penalty(real_video, real)
        loss = discriminator_loss(real, fake)
        # One backward pass serves both losses: R1 alone gives the last biases no gradient.
        scale = self.config.r1_gamma / 2 * self.config.r1_interval
        self.network.backward(loss + scale * penalty, weight, is_last)
        return {"discriminator": loss.detach(), "r1": penalty.detach()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Initialize the discriminator from another run's.

        Raises:
            ValueError: the other discriminator has another architecture.
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
        self.network.restart()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._has_autocast)


def _wide(video: Tensor) -> Tensor:
    """Convert to at least fp32: without autocast, a bf16 video from the decoder would meet fp32 weights."""
    return video.to(torch.promote_types(video.dtype, torch.float32))
