"""The autoencoder's losses against formulas written out, finite differences and invariances (fsae_spec section 10)."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from megatron_fsvideo.evaluation.perceptual import VGG_WIDTHS, PerceptualLoss, VGG16Trunk, load_perceptual_loss
from megatron_fsvideo.losses.lpips import sliced_perceptual_loss

CPU = torch.device("cpu")


def two_videos(shape: tuple[int, ...] = (2, 3, 5, 32, 32)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(shape, generator=generator) * 2 - 1
    return video, (video + 0.2 * torch.randn(shape, generator=generator)).requires_grad_(True)


@pytest.fixture(scope="module")
def lpips() -> PerceptualLoss:
    torch.manual_seed(0)
    weights = [torch.rand(width) / width for width in VGG_WIDTHS]
    return PerceptualLoss(VGG16Trunk(), weights, "random")


@pytest.mark.parametrize("frames_per_slice", [1, 2, 3])
def test_property_23_sliced_lpips_has_the_loss_and_gradient_of_unsliced(
    lpips: PerceptualLoss, frames_per_slice: int
) -> None:
    video, noisy = two_videos()
    whole = lpips(noisy, video)
    (expected,) = torch.autograd.grad(3 * whole, noisy)
    sliced = sliced_perceptual_loss(lpips, noisy, video, frames_per_slice)
    (gradient,) = torch.autograd.grad(3 * sliced, noisy)
    assert torch.allclose(sliced, whole, rtol=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    with torch.no_grad():
        assert torch.allclose(sliced_perceptual_loss(lpips, noisy, video, frames_per_slice), whole, rtol=1e-5)


def test_property_23_lpips_is_zero_for_equals_positive_and_symmetric(lpips: PerceptualLoss) -> None:
    video, noisy = two_videos()
    with torch.no_grad():
        assert lpips(video, video) == 0
        assert (lpips.per_frame(noisy, video) > 0).all()
        assert torch.allclose(lpips.per_frame(noisy, video), lpips.per_frame(video, noisy), rtol=1e-5)
        # Black frames have features that are zero: their unit vectors must not divide by zero.
        assert lpips(torch.full_like(video, -1.0), video).isfinite()


def test_lpips_reads_the_two_published_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = VGG16Trunk().state_dict() | {"classifier.0.weight": torch.zeros(1)}
    linear = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(VGG_WIDTHS)}
    torch.save(trunk, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    safetensors.torch.save_file(trunk | linear, tmp_path / "both.safetensors")
    two = load_perceptual_loss("vgg16", str(tmp_path / "vgg16.pth"), CPU, str(tmp_path / "vgg.pth"))
    one = load_perceptual_loss("vgg16", str(tmp_path / "both.safetensors"), CPU)
    video, noisy = two_videos((1, 3, 1, 32, 32))
    with torch.no_grad():
        assert two.label == one.label == "LPIPS-VGG16" and two(noisy, video) == one(noisy, video)

    with pytest.raises(ValueError, match="lacks 5 of LPIPS's weights, the first is lin0.model.1.weight"):
        load_perceptual_loss("vgg16", str(tmp_path / "vgg16.pth"), CPU, str(tmp_path / "vgg16.pth"))
    torch.save(linear | {"lin1.model.1.weight": torch.rand(1, 64, 1, 1)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="lin1.model.1.weight has 64 weights.*has 128"):
        load_perceptual_loss("vgg16", str(tmp_path / "vgg16.pth"), CPU, str(tmp_path / "vgg.pth"))
