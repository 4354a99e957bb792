"""Plain convolutional networks in Megatron's DDP train as in one process, and their state moves between layouts.

A tiny autoencoder and its discriminator, with AdamW and Muon, with and without the distributed optimizer.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from megatron.core import optimizer as megatron_optimizers
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fsvideo.checkpoint.run_record import RunDescription
from megatron_fsvideo.config import CheckpointConfig, DiTParallelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_fsvideo.losses.adversarial import discriminator_loss, generator_loss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.network import TrainedNetwork
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.state import TrainState
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


def build(optimizer: str, is_shared: bool, pgs) -> dict[str, TrainedNetwork]:
    parallel = ParallelConfig(use_distributed_optimizer=is_shared)
    settings = replace(SETTINGS, optimizer=optimizer)
    torch.manual_seed(0)
    fsae, discriminator = FSAE(config(attention_stages=0)), Discriminator(width=4, num_scales=2, num_layers=1)
    fsae.encoder.stem.requires_grad_(False)  # a part that is not trained
    of_discriminator = replace(settings, optimizer="adam", weight_decay=0.0, clip_grad=0.0)
    networks = {}
    for name, model, chosen in (("fsae", fsae, settings), ("discriminator", discriminator, of_discriminator)):
        own = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        networks[name] = TrainedNetwork(
            name,
            [model],
            own,
            fsae_parameter_rules(model),
            chosen,
            parallel,
            TrainingConfig(train_iters=END),
            pgs,
            {"kind": "toy", "model": {}},
        )
    return networks


def train_step(networks: dict[str, TrainedNetwork], iteration: int, pgs) -> list[float]:
    """Both networks on the same reconstructions; the norms of their gradients."""
    fsae, discriminator = networks["fsae"], networks["discriminator"]
    generator = torch.Generator().manual_seed(iteration)
    video = torch.rand(NUM_SAMPLES, 3, 5, 16, 16, generator=generator)[pgs.dp_rank :: pgs.dp_size] * 2 - 1
    micro_batches = video.chunk(2 // pgs.dp_size)
    for index, part in enumerate(micro_batches):
        is_last, weight = index == len(micro_batches) - 1, len(part) / len(video)
        with discriminator.frozen():
            reconstruction, _ = fsae.wrapped[0](part)
            loss = (reconstruction - part).square().mean() + 0.1 * generator_loss(discriminator.model(reconstruction))
            fsae.backward(loss, weight, is_last)
        judged = discriminator_loss(discriminator.wrapped[0](part), discriminator.wrapped[0](reconstruction.detach()))
        discriminator.backward(judged, weight, is_last)
    norms = []
    for network in networks.values():
        network.finish_gradients()
        outcome = network.step(iteration - 1, 1.0)
        assert outcome.has_stepped
        norms.append(outcome.grad_norm)
    return norms


def weights_of(networks: dict[str, TrainedNetwork]) -> dict[str, torch.Tensor]:
    """All weights of both networks, and all averages."""
    found = {}
    for name, network in networks.items():
        found |= {f"{name}.{key}": tensor.clone() for key, tensor in network.model.state_dict().items()}
        with network.average.applied():
            found |= {f"{name} average.{key}": t.clone() for key, t in network.model.state_dict().items()}
    return found


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts steps as Transformer Engine's and Apex's do: per parameter group, from the first step on."""

    def __init__(self, params, lr: float, weight_decay: float, betas, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                first = state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - beta1)
                second = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = second.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
                parameter.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**step))


@contextmanager
def fused_adam():
    """Megatron takes Transformer Engine's AdamW wherever that is installed."""
    with (
        patch.object(megatron_optimizers, "Adam", FusedAdam),
        patch.object(megatron_optimizers, "USING_PYTORCH_OPTIMIZER", False),
        patch.object(distrib_optimizer, "Adam", FusedAdam),
    ):
        yield


def run_fused(is_shared: bool, folder: Path, is_resumed: bool) -> dict:
    with fused_adam():
        return run("adam", is_shared, folder, is_resumed)


def run(optimizer: str, is_shared: bool, folder: Path, is_resumed: bool) -> dict:
    """The steps up to `END`, saved at `SAVED` or resumed there."""
    pgs = groups.initialize(DiTParallelConfig())
    networks, norms = build(optimizer, is_shared, pgs), []
    if is_resumed:
        assert checkpoints(folder, pgs).load(networks).iteration == SAVED
    for iteration in range(SAVED + 1 if is_resumed else 1, END + 1):
        norms.append(train_step(networks, iteration, pgs))
        if iteration == SAVED:
            saved = checkpoints(folder, pgs)
            saved.save(TrainState(SAVED, SAVED * NUM_SAMPLES), networks)
            saved.finish()
    states = [len(link.optimizer.state) for net in networks.values() for link in net.optimizer.chained_optimizers]
    averages = sum(average.numel() for net in networks.values() for average in net.average.weights.values())
    result = {"weights": weights_of(networks), "norms": norms, "states": states, "averages": averages}
    groups.shutdown()
    return result


def checkpoints(folder: Path, pgs) -> RunCheckpoints:
    config = CheckpointConfig(save=str(folder), load=str(folder))
    return RunCheckpoints(config, lambda: RunDescription({}), pgs, train_iters=END)


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


@pytest.mark.parametrize("is_shared", [False, True], ids=["whole", "distributed"])
def test_an_optimizer_that_counts_steps_per_group_resumes(is_shared, alone, tmp_path):
    ranks = run_workers(run_fused, 2, is_shared, tmp_path, False)
    for rank, again in zip(ranks, run_workers(run_fused, 2, is_shared, tmp_path, True), strict=True):
        close(rank, alone["adam"][0])
        for name, weight in rank["weights"].items():
            assert torch.equal(again["weights"][name], weight), f"{name} differs after a restart"


@pytest.mark.parametrize("is_shared", [False, True], ids=["whole", "distributed"])
def test_a_state_before_the_first_step_is_one_of_no_steps(is_shared):
    assert run_workers(steps_before_the_first, 1, is_shared)[0] == [0, 0]


def steps_before_the_first(is_shared: bool) -> list[int]:
    pgs = groups.initialize(DiTParallelConfig())
    with fused_adam():
        networks = build("muon", is_shared, pgs)
    steps = [network.section()["optimizer"]["step"] for network in networks.values()]
    groups.shutdown()
    return steps


def test_a_network_that_starts_anew_forgets_its_moments(tmp_path):
    assert run_workers(forgetful, 1)[0]


def forgetful() -> bool:
    pgs = groups.initialize(DiTParallelConfig())
    networks = build("muon", False, pgs)
    train_step(networks, 1, pgs)
    networks["fsae"].restart()
    is_empty = all(not link.optimizer.state for link in networks["fsae"].optimizer.chained_optimizers)
    groups.shutdown()
    return is_empty
