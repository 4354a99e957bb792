"""Plain convolutional networks in Megatron's DDP train as in one process, and their state moves between layouts.

A tiny autoencoder and its discriminator, with AdamW and Muon, with and without the distributed optimizer.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from torch import nn

from megatron_fsvideo.checkpoint.distributed import load_checkpoint
from megatron_fsvideo.checkpoint.sharded_state import plan_checkpoint
from megatron_fsvideo.checkpoint.writer import CheckpointWriter
from megatron_fsvideo.config import DiTParallelConfig, OptimizerConfig, ParallelConfig
from megatron_fsvideo.losses.adversarial import discriminator_loss, generator_loss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.optim.moving_average import MovingAverage
from megatron_fsvideo.optim.optimizer import build_optimizer, forget_moments, step_if_finite, wrap_ddp
from megatron_fsvideo.optim.schedule import set_learning_rates
from megatron_fsvideo.optim.state import load_optimizer_state, sharded_optimizer_state, sharded_weights
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from tests.parallel.harness import run_workers
from tests.unit.fsae_fixtures import config

NUM_SAMPLES, SAVED, END = 4, 2, 4
SETTINGS = OptimizerConfig(
    lr=2e-4,
    muon_lr=5e-3,
    weight_decay=0.1,
    adam_eps=1e-4,
    clip_grad=0.5,
    muon_precision="fp32",
    lr_warmup_iters=2,
    ema_decay=0.9,
)


class Network:
    """One network with all that trains it."""

    def __init__(self, model: nn.Module, settings: OptimizerConfig, parallel: ParallelConfig, pgs) -> None:
        self.model, self.settings, self.pgs = model, settings, pgs
        self.chunks = wrap_ddp([model], parallel, pgs)
        self.optimizer = build_optimizer(self.chunks, settings, fsae_parameter_rules(model), pgs)
        self.average = MovingAverage(self.optimizer, self.weights(), settings.ema_decay)

    def weights(self):
        return sharded_weights([self.model], self.pgs)

    def begin(self) -> None:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, iteration: int, loss: float) -> float:
        with megatron_on_cpu():
            finalize_model_grads(self.chunks, pg_collection=self.pgs.collection)
        set_learning_rates(self.optimizer.param_groups, iteration, END, self.settings)
        norm, has_stepped = step_if_finite(self.optimizer, loss, self.pgs)
        assert has_stepped
        self.average.update(iteration)
        return norm

    def section(self, name: str) -> dict:
        weights = self.weights()
        model = {key: replace(tensor, key=f"{name}.model.{tensor.key}") for key, tensor in weights.items()}
        return {
            "model": model,
            "ema": self.average.sharded_state(weights, f"{name}."),
            "optimizer": sharded_optimizer_state(self.optimizer, weights, f"{name}."),
        }

    def load_section(self, content: dict) -> None:
        self.model.load_state_dict({name.removeprefix("0."): tensor for name, tensor in content["model"].items()})
        self.average.load_state(content["ema"])
        load_optimizer_state(self.optimizer, self.weights(), content["optimizer"])


def build(optimizer: str, is_shared: bool, pgs) -> dict[str, Network]:
    parallel = DiTParallelConfig(use_distributed_optimizer=is_shared)
    settings = replace(SETTINGS, optimizer=optimizer)
    torch.manual_seed(0)
    fsae, discriminator = FSAE(config(attention_stages=0)), Discriminator(width=4, num_scales=2, num_layers=1)
    fsae.encoder.stem.requires_grad_(False)  # a part that is not trained
    of_discriminator = replace(settings, optimizer="adam", weight_decay=0.0, clip_grad=0.0)
    return {
        "fsae": Network(fsae, settings, parallel, pgs),
        "discriminator": Network(discriminator, of_discriminator, parallel, pgs),
    }


def train_step(networks: dict[str, Network], iteration: int, pgs) -> list[float]:
    """Both networks on the same reconstructions; the norms of their gradients."""
    fsae, discriminator = networks["fsae"], networks["discriminator"]
    generator = torch.Generator().manual_seed(iteration)
    video = torch.rand(NUM_SAMPLES, 3, 5, 16, 16, generator=generator)[pgs.dp_rank :: pgs.dp_size] * 2 - 1
    fsae.begin()
    discriminator.begin()
    for part in video.chunk(2 // pgs.dp_size):
        discriminator.model.requires_grad_(False)
        reconstruction, _ = fsae.chunks[0](part)
        loss = (reconstruction - part).square().mean() + 0.1 * generator_loss(discriminator.model(reconstruction))
        (loss * len(part) / len(video)).backward()
        discriminator.model.requires_grad_(True)
        judged = discriminator_loss(discriminator.chunks[0](part), discriminator.chunks[0](reconstruction.detach()))
        (judged * len(part) / len(video)).backward()
    return [network.step(iteration, 1.0) for network in networks.values()]


def weights_of(networks: dict[str, Network]) -> dict[str, torch.Tensor]:
    """All weights of both networks, and all averages."""
    found = {}
    for name, network in networks.items():
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in network.model.state_dict().items()}
        with network.average.applied():
            found |= {f"{name} average.{key}": t.clone() for key, t in network.model.state_dict().items()}
    return found


def run(optimizer: str, is_shared: bool, folder: Path, is_resumed: bool) -> dict:
    """The steps up to `END`, saved at `SAVED` or resumed there."""
    pgs = groups.initialize(DiTParallelConfig())
    networks, norms = build(optimizer, is_shared, pgs), []
    if is_resumed:
        content = load_checkpoint(folder, SAVED, {name: net.section(name) for name, net in networks.items()})
        for name, network in networks.items():
            network.load_section(content[name])
    for iteration in range(SAVED + 1 if is_resumed else 1, END + 1):
        norms.append(train_step(networks, iteration, pgs))
        if iteration == SAVED:
            save(networks, folder, pgs)
    states = [len(link.optimizer.state) for net in networks.values() for link in net.optimizer.chained_optimizers]
    averages = sum(average.numel() for net in networks.values() for average in net.average.weights.values())
    result = {"weights": weights_of(networks), "norms": norms, "states": states, "averages": averages}
    groups.shutdown()
    return result


def save(networks: dict[str, Network], folder: Path, pgs) -> None:
    writer = CheckpointWriter(folder, pgs, 0, False)
    content = {name: network.section(name) for name, network in networks.items()}
    writer.save(
        SAVED, lambda target: plan_checkpoint(target, content, {}, is_rank_zero=pgs.is_rank_zero, in_background=False)
    )
    writer.finish()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """kind -> (what one process makes, where it has saved)."""
    found = {}
    for kind in ("adam", "muon"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = run_workers(run, 1, kind, False, folder, False)[0], folder
    return found


def close(found: dict, expected: dict) -> None:
    for norms, expected_norms in zip(found["norms"], expected["norms"][-len(found["norms"]) :], strict=True):
        assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-4 * weight.norm() + 1e-7, name


@pytest.mark.parametrize("is_shared", [False, True], ids=["whole", "distributed"])
@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_two_processes_are_one_and_resume(kind, is_shared, alone, tmp_path):
    expected, saved_alone = alone[kind]
    ranks = run_workers(run, 2, kind, is_shared, tmp_path, False)
    resumed = run_workers(run, 2, kind, is_shared, tmp_path, True)
    for rank, again in zip(ranks, resumed, strict=True):
        close(rank, expected)
        for name, weight in rank["weights"].items():
            assert torch.equal(again["weights"][name], weight), f"{name} differs after a restart"
    share = 0.6 if is_shared else 1.0
    for rank in ranks:
        assert rank["averages"] <= share * expected["averages"] + 1
    # Another number of processes, in both directions.
    close(run_workers(run, 1, kind, False, tmp_path, True)[0], expected)
    close(run_workers(run, 2, kind, is_shared, saved_alone, True)[1], expected)


def test_a_network_that_starts_anew_forgets_its_moments(tmp_path):
    assert run_workers(forgetful, 1)[0]


def forgetful() -> bool:
    pgs = groups.initialize(DiTParallelConfig())
    networks = build("muon", False, pgs)
    train_step(networks, 1, pgs)
    forget_moments(networks["fsae"].optimizer)
    is_empty = all(not link.optimizer.state for link in networks["fsae"].optimizer.chained_optimizers)
    groups.shutdown()
    return is_empty
