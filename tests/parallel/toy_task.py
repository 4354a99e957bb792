"""The smallest job with several networks: a student learns what a frozen base makes, a critic judges the student.

With the plain loop the student also learns through the frozen critic, from one forward pass of each micro-batch. With
Megatron's schedule the base's outputs are prepared first, and student and critic learn apart.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, OptimizerConfig, TrainingConfig
from megatron_fsvideo.models.dit import DiTModel, build_dit_chunks
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum
from megatron_fsvideo.training.frozen_network import FrozenNetwork
from megatron_fsvideo.training.network import TrainedNetwork
from megatron_fsvideo.training.state import StepResult, TrainState

MODEL = DiTConfig(
    num_layers=4,
    hidden_size=24,
    num_attention_heads=2,
    ffn_hidden_size=48,
    latent_channels=4,
    text_embed_dim=6,
    image_embed_dim=0,
    freq_dim=16,
)
TRAINING = TrainingConfig(train_iters=4, global_batch_size=4)
SETTINGS = {
    "student": OptimizerConfig(lr=1e-2, adam_eps=1e-4, ema_decay=0.5, lr_warmup_iters=2, weight_decay=0.1),
    "critic": OptimizerConfig(lr=2e-2, adam_eps=1e-4, ema_decay=0.0, clip_grad=0.05),
}


class ToyTask:
    """Four samples an iteration, of which each data-parallel rank has its share.

    Args:
        plain: the plain loop; otherwise Megatron's schedule.
    """

    def __init__(self, parallel: DiTParallelConfig, pgs: ProcessGroups, plain: bool) -> None:
        self.pgs, self.plain = pgs, plain

        def build(seed: int) -> list[DiTModel]:
            return build_dit_chunks(MODEL, parallel, pgs, params_dtype=torch.float32, seed=seed)

        self.base = FrozenNetwork(randomize(build(1)), "base", "f" * 64, pgs)
        self.networks = {}
        for seed, (name, settings) in enumerate(SETTINGS.items(), 2):
            chunks = randomize(build(seed))
            self.networks[name] = TrainedNetwork(
                name,
                chunks,
                chunks[0].config,
                dit_parameter_rules(chunks, settings.router_lr_mult),
                settings,
                parallel,
                TRAINING,
                pgs,
                {"kind": "toy", "model": {}},
            )

    def train_step(self, state: TrainState) -> StepResult:
        """Both networks step."""
        per_rank = TRAINING.global_batch_size // self.pgs.dp_size
        first = state.consumed_samples + self.pgs.dp_rank * per_rank
        samples = [sample(number) for number in range(first, first + per_rank)]
        losses = self._plain(samples) if self.plain else self._scheduled(samples)
        losses = all_reduce_sum(all_reduce_sum(losses, self.pgs.dp), self.pgs.pp) / TRAINING.global_batch_size
        outcomes = [
            network.step(state.iteration, loss)
            for network, loss in zip(self.networks.values(), losses.tolist(), strict=True)
        ]
        assert all(outcome.has_stepped for outcome in outcomes)
        names = ("loss", "critic_loss", "grad_norm", "critic_grad_norm")
        values = (*losses.tolist(), *(outcome.grad_norm for outcome in outcomes))
        return StepResult(dict(zip(names, values, strict=True)), TRAINING.global_batch_size)

    def _plain(self, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
        student, critic = self.networks.values()
        sums = torch.zeros(2)
        for index, (noisy, text) in enumerate(samples):
            is_last = index == len(samples) - 1
            with torch.no_grad():
                target = run(self.base.model, noisy, text)
            with critic.frozen():
                output = run(student.wrapped[0], noisy, text)
                judged = run(critic.wrapped[0], as_latents(output), text)
                loss = (output - target).square().mean() + 0.1 * judged.square().mean()
                student.backward(loss, 1 / len(samples), is_last)
            critic_loss = (run(critic.wrapped[0], as_latents(output.detach()), text) - 1).square().mean()
            critic.backward(critic_loss, 1 / len(samples), is_last)
            sums += torch.stack([loss.detach(), critic_loss.detach()])
        for network in (student, critic):
            network.finish_gradients()
        return sums

    def _scheduled(self, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
        targets = self.base.prepare(samples, lambda iterator, chunk: run(chunk, *next(iterator)))
        batches = [(*pair, target) for pair, target in zip(samples, targets, strict=True)]
        sums = torch.zeros(2)
        for index, network in enumerate(self.networks.values()):
            for entry in network.accumulate(batches, partial(forward_step, sign=1 - 2 * index)):
                sums[index] += entry["loss"]
        return sums


def run(model: torch.nn.Module, noisy: Tensor, text: Tensor) -> Tensor:
    """A network's tokens [1, n, c] for latents [1, c, t, h, w]."""
    padding = noisy.new_zeros(1, MODEL.in_channels - noisy.shape[1], *noisy.shape[2:])
    return model(torch.cat([noisy, padding], dim=1), torch.tensor([400.0]), text, None)


def forward_step(iterator, chunk, *, sign: int):
    """Megatron's: the critic learns the opposite."""
    noisy, text, target = next(iterator)

    def loss_function(output: Tensor):
        loss = (output - sign * target).square().mean()
        return loss, {"loss": loss.detach().clone()}

    return run(chunk, noisy, text), loss_function


def as_latents(tokens: Tensor) -> Tensor:
    """[1, n, c] -> [1, c, t, h, w]."""
    return tokens.transpose(1, 2).reshape(1, MODEL.latent_channels, 2, 2, 4)


def sample(number: int) -> tuple[Tensor, Tensor]:
    """Latents and text."""
    generator = torch.Generator().manual_seed(number)
    return (
        torch.randn(1, MODEL.latent_channels, 2, 2, 4, generator=generator),
        torch.randn(1, 3, MODEL.text_embed_dim, generator=generator),
    )


@torch.no_grad()
def randomize(chunks: list[DiTModel]) -> list[DiTModel]:
    """The head starts at zero, which would hide the rest."""
    for chunk in chunks:
        if chunk.head is not None:
            generator = torch.Generator().manual_seed(0)
            chunk.head.proj_out.weight.copy_(0.2 * torch.randn(chunk.head.proj_out.weight.shape, generator=generator))
    return chunks
