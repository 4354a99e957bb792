"""The autoencoder on two gloo processes makes the losses and weights of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, ParallelConfig, build_job
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.state import TrainState
from tests.parallel.harness import run_workers


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(3, 8, 8, generator=generator)
    texture = torch.nn.functional.interpolate(texture[None], (40, 40), mode="bilinear")[0] * 255
    frames = torch.stack([texture.roll(k, dims=2) for k in range(24)]).movedim(1, -1).to(torch.uint8)
    write_video(folder / "film.mp4", frames, fps=25)
    return folder


def train_steps(job: FSAEJob) -> tuple[list[float], list[float], torch.Tensor]:
    """Losses, gradient norms and all weights after the job's iterations."""
    pgs = groups.initialize(ParallelConfig())
    step, state = FSAETask(job, pgs), TrainState()
    losses, norms = [], []
    for _ in range(job.training.train_iters):
        result = step.train_step(state)
        state.advance(result.num_samples)
        losses.append(result.metrics["loss"])
        norms.append(result.metrics["grad_norm"])
    groups.shutdown()
    return losses, norms, torch.cat([p.detach().flatten() for p in step.learner.model.parameters()])


def test_two_processes_are_one(video_dir: Path) -> None:
    values = {"video_dir": str(video_dir), "train_iters": 4, "image_warmup_iters": 2, "image_batch_size": 4}
    values |= {"micro_batch_size": 1, "global_batch_size": 4, "lr": 2e-4, "adam_eps": 1e-4, "ema_decay": 0.0}
    job = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values)
    ((losses, norms, weights),) = run_workers(train_steps, 1, job)
    for other_losses, other_norms, other_weights in run_workers(train_steps, 2, job):
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert other_norms[0] == pytest.approx(norms[0], rel=1e-5)
        # L1's gradient is a sign: once the weights differ in the last digit, single pixels change sides.
        assert other_norms == pytest.approx(norms, rel=2e-3)
        assert (other_weights - weights).norm() / weights.norm() < 1e-4


def test_two_processes_are_one_on_buckets_and_images_with_noise(video_dir: Path) -> None:
    """Image batches are a micro-batch of 4, or one of 2 on each process. A Lite decoder adds noise."""
    values = {"video_dir": str(video_dir), "train_iters": 3, "phase": 6, "decoder": "lite", "gan_weight": 0.0}
    values |= {"micro_batch_size": 1, "global_batch_size": 4, "lr": 2e-4, "adam_eps": 1e-4, "ema_decay": 0.0}
    values |= {"buckets": ("9x32x32", "5x16x24", "1x32x32"), "image_fraction": 0.4, "image_batch_size": 4}
    values |= {"first_frame_head_dim": 8, "seed": 2}  # which draws each bucket once
    job = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values)
    ((losses, norms, _),) = run_workers(train_steps, 1, job)
    for other_losses, other_norms, _ in run_workers(train_steps, 2, job):
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert other_norms[0] == pytest.approx(norms[0], rel=1e-5)


def train_both(job: FSAEJob) -> tuple[list[dict[str, float]], torch.Tensor, torch.Tensor, list[int]]:
    """Metrics, all weights of autoencoder and projection, of the discriminator, and each optimizer's moments here."""
    pgs = groups.initialize(ParallelConfig())
    step, state = FSAETask(job, pgs), TrainState()
    metrics = []
    for _ in range(job.training.train_iters):
        result = step.train_step(state)
        state.advance(result.num_samples)
        metrics.append(result.metrics)
    groups.shutdown()
    *autoencoding, discriminator = step.networks.values()
    weights = [
        torch.cat([p.detach().flatten() for network in networks for p in network.model.parameters()])
        for networks in (autoencoding, [discriminator])
    ]
    held = [
        sum(moment.numel() for state in link.optimizer.state.values() for moment in state.values() if moment.ndim)
        for network in step.networks.values()
        for link in network.optimizer.chained_optimizers
    ]
    return metrics, *weights, held


@pytest.mark.parametrize("optimizer, shared", [("adam", False), ("adam", True), ("muon", True)])
def test_two_processes_are_one_with_adversary_and_alignment(
    video_dir: Path, dino_folder: Path, optimizer: str, shared: bool
) -> None:
    values = {"video_dir": str(video_dir), "train_iters": 3, "phase": 4, "vf_encoder_path": str(dino_folder)}
    values |= {"micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "adam_eps": 1e-4, "ema_decay": 0.0}
    values |= {"discriminator_width": 4, "discriminator_scales": 2, "discriminator_layers": 1, "vf_grid": 4}
    # Step 1 trains the discriminator alone, steps 1 and 3 have R1.
    values |= {"discriminator_warmup_iters": 1, "r1_interval": 2, "optimizer": optimizer}
    values |= {"muon_precision": "fp32"}  # bf16 makes more of the last digit
    job = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values)
    ((metrics, weights, discriminator, held),) = run_workers(train_both, 1, job)
    assert "r1" in metrics[0] and metrics[0]["grad_norm"] == 0 < metrics[1]["grad_norm"]
    distributed = replace(job, parallel=replace(job.parallel, use_distributed_optimizer=shared))
    results = run_workers(train_both, 2, distributed)
    assert all(result[3][0] > 0 for result in results)
    for theirs in zip(*(result[3] for result in results), held, strict=True):
        first, second, all_of_them = theirs
        # Megatron pads its buffers: one of the ranks may hold nothing of a network as small as the projection.
        assert first + second == all_of_them if shared else first == second == all_of_them
    for other_metrics, other_weights, other_discriminator, _ in results:
        assert [row.keys() for row in other_metrics] == [row.keys() for row in metrics]
        assert other_metrics[0] == pytest.approx(metrics[0], rel=1e-5)
        assert other_metrics[1] == pytest.approx(metrics[1], rel=1e-4)
        assert other_metrics[2] == pytest.approx(metrics[2], rel=2e-3)
        assert (other_weights - weights).norm() / weights.norm() < (1e-4 if optimizer == "adam" else 5e-3)
        assert (other_discriminator - discriminator).norm() / discriminator.norm() < 1e-4


def test_batches_that_do_not_divide_are_refused(video_dir: Path) -> None:
    values = {"video_dir": str(video_dir), "micro_batch_size": 1, "global_batch_size": 3}
    with pytest.raises(AssertionError, match="global_batch_size 3 is not a multiple of micro_batch_size 1 x 2"):
        run_workers(train_steps, 2, build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values))
