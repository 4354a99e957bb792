"""The networks of an autoencoder job and their training on one micro-batch, without data and folders.

encode -> (noise, transform) -> decode -> losses -> backward -> the discriminator's losses -> backward
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEJob, to_dict
from megatron_fsvideo.losses.latent_regularizers import LatentTransform
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE, PatchBox
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.models.parameter_rules import UNDECAYED, ParameterRules
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.seeds import derive_seed
from megatron_fsvideo.tasks.fsae.adversary import Adversary
from megatron_fsvideo.tasks.fsae.forward import ForwardOutput, FSAEForward
from megatron_fsvideo.tasks.fsae.objective import FSAEObjective, draw_latent_noise, whole_reconstruction
from megatron_fsvideo.tasks.fsae.patches import whole_region
from megatron_fsvideo.training.network import TrainedNetwork, plain_config


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass.

    Attributes:
        video: whole clips [b, 3, f, h, w] in [-1, 1].
        first: number of the first sample.
        iteration: number of optimizer steps done.
        transform: transform of the video or of its latents, or None.
        box: part of this process's latents that the decoder's outer stages see; None for all.
        shards: this process's frames; None for all.
        weight: share of the micro-batch in this rank's samples of the step.
        is_last: whether the micro-batch is this rank's last in the step.
    """

    video: Tensor
    first: int
    iteration: int
    transform: LatentTransform | None
    box: PatchBox | None
    shards: FrameShards | None
    weight: float
    is_last: bool


class Passed(NamedTuple):
    """Result of a forward pass: output, encoded video, vision features of the video, and transform of the latents."""

    output: ForwardOutput
    video: Tensor
    features: Tensor | None
    transform: LatentTransform | None


class FSAELearner:
    """The networks of an autoencoder job and its losses.

    Attributes:
        networks: `fsae`; in phase 4 `projection`, of the latents to the vision features; with an adversary
            `discriminator`.

    Args:
        network_type: the class of the networks; the memory account passes one that counts (tools/counted_step.py).
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups, network_type: type[TrainedNetwork] = TrainedNetwork) -> None:
        self.job, self.pgs, self._network_type = job, pgs, network_type
        self.objective = FSAEObjective(job, pgs.device)
        torch.manual_seed(derive_seed(job.training.seed, "fsae"))
        self.model = FSAE(job.model).to(pgs.device)
        is_recomputed = job.parallel.recompute_granularity == "full"
        self.model.recompute(is_recomputed, outer_encoder=not job.memory.encoder_tile)
        projection = None
        if self.objective.dino is not None:
            projection = LatentProjection(job.model.latent_channels, self.objective.dino.channels).to(pgs.device)
        self.forward = FSAEForward(self.model, job.phase.trains_encoder, projection, job.memory)
        rules = fsae_parameter_rules(self.model)
        self.fsae = self._network("fsae", self.model, rules, to_dict(job.model), job.optimizer.ema_decay)
        self.networks = {"fsae": self.fsae}
        if projection is not None:
            sizes = {"latent_channels": job.model.latent_channels, "channels": self.objective.dino.channels}
            self.networks["projection"] = self._network(
                "projection", projection, dict.fromkeys(projection.parameters(), UNDECAYED), sizes, 0.0
            )
        self._autoencoding = list(self.networks.values())
        self.adversary = Adversary(job, pgs, network_type) if job.uses_gan else None
        if self.adversary is not None:
            self.networks["discriminator"] = self.adversary.network

    def rests(self, iteration: int) -> bool:
        """Whether only the discriminator is trained in the step after `iteration` steps."""
        return self.adversary is not None and self.adversary.learns_alone(iteration)

    def adversary_under(self, transform: LatentTransform | None) -> Adversary | None:
        """The adversary; None if a transform replaces the plain video, the only one that the discriminator can see."""
        return self.adversary if transform is None or transform.role == "added" else None

    def learn(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to all networks; return its loss and the parts of the loss."""
        learns = not self.rests(batch.iteration)
        adversary = self.adversary_under(batch.transform)
        weight = batch.weight / self.pgs.cp_size  # each rank of a clip has its own loss; their mean counts
        with adversary.network.frozen() if adversary is not None else nullcontext():
            with torch.set_grad_enabled(learns):
                passed = self.run(batch)
                loss, parts = self.losses(batch, passed)
            if learns:
                self.fsae.backward(loss, weight, batch.is_last, *self._autoencoding[1:])
        if adversary is not None:
            parts |= self.discriminate(batch, passed, weight)
        return {"loss": loss.detach(), **parts}

    def run(self, batch: MicroBatch) -> Passed:
        """Run the forward pass."""
        video, transform = batch.video, batch.transform
        if transform is not None and transform.role == "before_encoding":
            video, transform = transform.of_video(video, self.model.spatial_factor), None
        with self.autocast():
            features = self.objective.features(video)
            size = None if features is None else features.shape[3:]
            noise = self._latent_noise(batch.first, video)
            numbers = range(batch.first, batch.first + len(video))
            noise_seeds = tuple(derive_seed(self.job.training.seed, number, "decoder_noise") for number in numbers)
            output = self.forward(video, noise, transform, size, noise_seeds, batch.box, batch.shards)
        return Passed(output, video, features, transform)

    def losses(self, batch: MicroBatch, passed: Passed) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a forward pass, and its parts by name."""
        return self.objective(
            passed.output,
            passed.video,
            self.model,
            features=passed.features,
            transform=passed.transform,
            adversary=self.adversary_under(batch.transform),
            shards=batch.shards,
        )

    def discriminate(self, batch: MicroBatch, passed: Passed, weight: float) -> dict[str, Tensor]:
        """Add the discriminator's gradients, and return the parts of its loss."""
        assert self.adversary is not None
        with torch.no_grad():
            fake = whole_reconstruction(passed.output, batch.shards)
        region = passed.output.region
        real = passed.video if region is None else whole_region(region, batch.shards).of(passed.video)
        return self.adversary.backward(real, fake, batch.iteration, weight, batch.is_last)

    def step(self, iteration: int, adversary: Adversary | None, loss: float) -> dict[str, float]:
        """Step the networks with gradients if the loss is finite; return gradient norms and the learning rate.

        Args:
            adversary: adversary whose discriminator has gradients.
            loss: loss of the step, equal on all ranks.
        """
        metrics = {"grad_norm": 0.0, "learning_rate": 0.0}
        learning = [] if self.rests(iteration) else list(self._autoencoding)
        if adversary is not None:
            learning.append(adversary.network)
        for network in learning:
            network.finish_gradients()
            outcome = network.step(iteration, loss)
            if network is self.fsae:
                metrics |= {"grad_norm": outcome.grad_norm, "learning_rate": outcome.learning_rate}
            else:
                metrics[f"{network.name}_grad_norm"] = outcome.grad_norm
        return metrics

    def autocast(self) -> torch.autocast:
        """Context with bfloat16 arithmetic in the forward pass if the job asks for it. The weights are fp32."""
        return torch.autocast(self.pgs.device.type, torch.bfloat16, enabled=self.job.training.bf16)

    def _latent_noise(self, first: int, video: Tensor) -> Tensor | None:
        strength = self.job.losses.latent_noise
        if strength == 0:
            return None
        sizes = self.job.model.compression.latent_shape(*video.shape[2:])
        shape = (len(video), self.model.latent_channels, *sizes)
        return draw_latent_noise(self.job.training.seed, first, shape, strength).to(self.pgs.device)

    def _network(
        self, name: str, module: nn.Module, rules: ParameterRules, sizes: dict[str, Any], ema_decay: float
    ) -> TrainedNetwork:
        job = self.job
        record = {"kind": name, "model": sizes, "bf16": job.training.bf16}
        settings = replace(job.optimizer, ema_decay=ema_decay)
        return self._network_type(
            name, [module], plain_config(), rules, settings, job.parallel, job.training, self.pgs, record
        )
