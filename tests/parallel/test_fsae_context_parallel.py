"""The autoencoder's training step with a clip's frames on two processes: losses and gradients of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_fsvideo.config import FSAEJob
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.network import StepOutcome, TrainedNetwork
from megatron_fsvideo.training.state import TrainState
from tests.parallel.harness import run_workers
from tests.unit.fsae_large_clips import CUTS, large_job, make_large_film


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large_film(tmp_path_factory.mktemp("videos"))


class TinyTrunk(nn.Module):
    """A perceptual network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        first = torch.relu(self.first(frames))
        return [first, torch.relu(self.second(first))]


def networks_of_autoencoder(task: FSAETask) -> list[TrainedNetwork]:
    """All but the discriminator."""
    return [network for name, network in task.networks.items() if name != "discriminator"]


def gradients_of_step(job: FSAEJob, iteration: int) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Metrics of one step and what both optimizers were given, clipping left out.

    In fp64: in fp32 single pixels change sides of L1's gradient, which alone is more than 1e-5.
    """
    pgs = groups.initialize(job.parallel)
    torch.set_default_dtype(torch.float64)
    step, found = FSAETask(job, pgs), []
    torch.manual_seed(0)
    # With weights of its own: no job can name this trunk.
    losses = replace(job.losses, perceptual_weight=0.5)
    frozen = replace(job.perceptual, perceptual_trunk="vgg16", perceptual_frames=3)
    step.learner.objective.job = replace(job, losses=losses, perceptual=frozen)
    step.learner.objective.perceptual = PerceptualLoss(TinyTrunk(), None, "")
    read = step.batches.read
    step.batches.read = lambda first, plan: read(first, plan).double()
    features = step.learner.objective.features  # DINOv2 is fp32
    if step.learner.objective.dino is not None:
        step.learner.objective.features = lambda video: features(video.float()).double()
    for networks in (networks_of_autoencoder(step), [step.learner.adversary.network]):

        def record(iteration: int, loss: float, networks=networks) -> StepOutcome:
            parameters = [p for network in networks for p in network.model.parameters() if p.requires_grad]
            gradient = torch.cat([p.main_grad.flatten().clone() for p in parameters])
            found.append(gradient)
            return StepOutcome(float(gradient.norm()), 0.0, True)

        networks[-1].step = record
        for network in networks[:-1]:
            network.step = lambda iteration, loss: StepOutcome(0.0, 0.0, True)
    result = step.train_step(TrainState(iteration, 2 * iteration))
    assert result.skipped is None
    groups.shutdown()
    return result.metrics, *found


def assert_two_are_one(
    job: FSAEJob,
    other: FSAEJob,
    world_size: int = 2,
    iteration: int = 0,
) -> dict[str, float]:
    ((metrics, *expected),) = run_workers(gradients_of_step, 1, job, iteration)
    for other_metrics, *gradients in run_workers(gradients_of_step, world_size, other, iteration):
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-8)
        for ours, theirs in zip(expected, gradients, strict=True):
            assert ours.ne(0).float().mean() > 0.3, "vacuous otherwise"
            assert (theirs - ours).norm() / ours.norm() < 1e-5
    return metrics


@pytest.mark.parametrize("phase", [3, 5, 6])
def test_two_processes_share_a_clip(video_dir: Path, phase: int) -> None:
    changes = CUTS | {"image_fraction": 0.0}
    one, two = (large_job(phase, video_dir, context_parallel_size=n, **changes) for n in (1, 2))
    metrics = assert_two_are_one(one, two)
    assert {"l1", "gradient", "multiscale", "ssim", "perceptual", "gan", "discriminator", "r1"} <= metrics.keys()


def test_whole_frames_with_alignment(video_dir: Path, dino_folder: Path) -> None:
    changes = {"vf_encoder_path": str(dino_folder), "vf_grid": 4, "vf_weight": 0.5, "image_fraction": 0.0}
    one, two = (large_job(4, video_dir, context_parallel_size=n, **changes) for n in (1, 2))
    metrics = assert_two_are_one(one, two)
    assert {"vf_cosine", "vf_distance"} <= metrics.keys()


def test_images_are_dealt_out(video_dir: Path) -> None:
    # Without patches: a micro-batch has one place, and one process has both images in one micro-batch.
    changes = {"encoder_tile": 32, "image_fraction": 1.0}
    one, two = (large_job(3, video_dir, context_parallel_size=n, **changes) for n in (1, 2))
    assert_two_are_one(one, two, iteration=1)


@pytest.mark.slow
def test_two_pairs_of_processes(video_dir: Path) -> None:
    changes = CUTS | {"image_fraction": 0.0}
    one, two = (large_job(3, video_dir, context_parallel_size=n, **changes) for n in (1, 2))
    assert_two_are_one(one, two, world_size=4)


def test_clips_too_short_are_refused(video_dir: Path) -> None:
    job = large_job(3, video_dir, context_parallel_size=2, num_frames=9)
    with pytest.raises(AssertionError, match="clips of 9 frames cannot be shared by context_parallel_size 2.*least 13"):
        run_workers(gradients_of_step, 2, job, 0)
