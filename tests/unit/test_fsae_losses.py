"""The autoencoder's losses against formulas written out, finite differences and invariances."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from megatron_fsvideo.losses.latent_regularizers import LatentTransform, draw_transform
from megatron_fsvideo.losses.lpips import sliced_perceptual_loss
from megatron_fsvideo.losses.video_vf import LatentProjection, adaptive_weight, pool_features, video_vf_losses
from megatron_fsvideo.models.frozen.dinov2 import load_dinov2
from megatron_fsvideo.models.frozen.perceptual import VGG_WIDTHS, PerceptualLoss, VGG16Trunk, load_perceptual_loss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator, shrink

CPU = torch.device("cpu")


def two_videos(shape: tuple[int, ...] = (2, 3, 3, 16, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(shape, generator=generator) * 2 - 1
    return video, (video + 0.2 * torch.randn(shape, generator=generator)).requires_grad_(True)


@pytest.fixture(scope="module")
def lpips() -> PerceptualLoss:
    torch.manual_seed(0)
    weights = [torch.rand(width) / width for width in VGG_WIDTHS]
    return PerceptualLoss(VGG16Trunk(), weights, "random")


@pytest.mark.parametrize("frames_per_slice", [1, 2])
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


def test_the_discriminator_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        model = Discriminator()
        shapes = [tuple(scale.shape) for scale in model(torch.empty(1, 3, 17, 128, 128))]
        images = [tuple(scale.shape) for scale in model(torch.empty(1, 3, 1, 128, 128))]
        smallest = [tuple(scale.shape[2:]) for scale in model(torch.empty(1, 3, 17, 93, 93))]
        with pytest.raises(ValueError, match="at least 93 pixels, got 64x128"):
            model(torch.empty(1, 3, 17, 64, 128))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(24.9e6, rel=2e-3)
    assert shapes == [(1, 1, 5, 14, 14), (1, 1, 3, 6, 6), (1, 1, 2, 2, 2)]
    assert images == [(1, 1, 1, 14, 14), (1, 1, 1, 6, 6), (1, 1, 1, 2, 2)]
    assert smallest[2] == (2, 1, 1)


def test_property_22_images_pass_the_discriminator() -> None:
    model = Discriminator(width=4, num_scales=2, num_layers=2)
    image = torch.randn(2, 3, 1, 32, 40, requires_grad=True)
    logits = model(image)
    assert [scale.shape[2] for scale in logits] == [1, 1]
    (generator_loss(logits) + r1_penalty(image, logits)).backward()
    assert image.grad.abs().sum() > 0 and all(p.grad is not None for p in model.parameters())
    # Averages over a frame, not over a frame and zeros: a constant image stays constant.
    assert torch.allclose(shrink(torch.ones(1, 3, 1, 8, 8)), torch.ones(1, 3, 1, 4, 4))
    assert torch.allclose(shrink(torch.ones(1, 3, 5, 7, 8)), torch.ones(1, 3, 3, 4, 4))


def test_property_21_gan_losses_pull_in_their_directions() -> None:
    real = [torch.tensor([[2.0, -1.0]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)]
    fake = [torch.tensor([[0.3, 0.1]], requires_grad=True), torch.tensor([[-3.0]], requires_grad=True)]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = ((softplus(-2) + softplus(1)) / 2 + softplus(-0.5)) / 2
    expected += ((softplus(0.3) + softplus(0.1)) / 2 + softplus(-3)) / 2
    loss = discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    # Descent raises the logits of videos and lowers those of reconstructions; the generator does the opposite.
    assert all((scale.grad < 0).all() for scale in real) and all((scale.grad > 0).all() for scale in fake)
    for scale in fake:
        scale.grad = None
    loss = generator_loss(fake)
    assert loss.item() == pytest.approx(((softplus(-0.3) + softplus(-0.1)) / 2 + softplus(3)) / 2, rel=1e-6)
    loss.backward()
    assert all((scale.grad < 0).all() for scale in fake)


def test_property_21_r1_is_the_finite_difference() -> None:
    torch.manual_seed(0)
    model = Discriminator(width=2, num_scales=2, num_layers=1).double()
    video = torch.randn(2, 3, 3, 14, 14, dtype=torch.float64, requires_grad=True)
    logits = model(video)
    penalty = r1_penalty(video, logits)

    def total(x: Tensor) -> Tensor:
        return sum(scale.flatten(1).sum(1) for scale in model(x))

    # The gradient's square from its projections on random directions of unit covariance would be noisy: every pixel.
    with torch.no_grad():
        squares, step = 0.0, 1e-5
        for index in range(video[0].numel()):
            offset = torch.zeros_like(video[:1]).flatten()
            offset[index] = step
            offset = offset.view_as(video[:1])
            squares = squares + ((total(video + offset) - total(video - offset)) / (2 * step)) ** 2
    num_patches = sum(scale[0].numel() for scale in logits)
    assert penalty.item() == pytest.approx(float(squares.mean() / num_patches), rel=1e-6)

    # Its gradient with respect to a weight, by finite difference of the penalty itself.
    penalty.backward()
    for weight, index in ((model.scales[0].layers[0].weight, 5), (model.scales[1].layers[1].weight, 7)):
        flat = weight.data.view(-1)
        values = []
        for sign in (1, -1):
            flat[index] += sign * 1e-6
            again = video.detach().requires_grad_(True)
            values.append(float(r1_penalty(again, model(again))))
            flat[index] -= sign * 1e-6
        assert float(weight.grad.view(-1)[index]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_property_21_r1_of_a_tiled_clip_is_that_of_the_clip() -> None:
    torch.manual_seed(0)
    model = Discriminator(width=4, num_scales=1, num_layers=1)
    clip = torch.randn(1, 3, 2, 32, 32)
    penalties, squares = [], []
    for video in (clip, clip.tile(1, 1, 1, 2, 2)):
        video = video.requires_grad_(True)
        logits = model(video)
        penalties.append(float(r1_penalty(video, logits)))
        squares.append(penalties[-1] * logits[0].numel())
    # Borders differ a little; without the division it would be 4 times as large.
    assert penalties[1] == pytest.approx(penalties[0], rel=0.15) and squares[1] > 3.5 * squares[0]


def random_features(shape: tuple[int, ...] = (2, 6, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def test_property_24_vf_is_equations_2_and_3() -> None:
    latents, features = random_features()
    mcos, mdms = video_vf_losses(latents, features, 0.5, 0.25)
    cosines, distances = [], []
    for z, f in zip(latents, features, strict=True):
        z, f = (x.flatten(1).T / x.flatten(1).T.norm(dim=1, keepdim=True) for x in (z, f))
        cosines += [max(0.0, 1 - 0.5 - float(a @ b)) for a, b in zip(z, f, strict=True)]
        n = len(z)
        distances += [max(0.0, abs(float(z[p] @ z[q] - f[p] @ f[q])) - 0.25) for p in range(n) for q in range(n)]
    assert float(mcos) == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert float(mdms) == pytest.approx(sum(distances) / len(distances), rel=1e-4)

    # Another sample is no partner: the loss of two is the mean of theirs.
    apart = [video_vf_losses(latents[k : k + 1], features[k : k + 1])[1] for k in range(2)]
    assert torch.allclose(mdms, torch.stack(apart).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="differ in shape"):
        video_vf_losses(latents[:, :, :2], features)


def test_property_24_vf_of_aligned_latents_is_zero_and_margins_forgive() -> None:
    latents, _ = random_features()
    assert [float(loss) for loss in video_vf_losses(latents, 3.0 * latents)] == [0.0, 0.0]
    # Turn every token by an angle: its cosine is cos(angle), and a margin of 1 - cos(angle) forgives it.
    other = torch.randn_like(latents)
    unit = F.normalize(latents, dim=1)
    away = F.normalize(other - (other * unit).sum(1, keepdim=True) * unit, dim=1)
    turned = 0.6 * unit + 0.8 * away
    assert float(video_vf_losses(latents, turned, cosine_margin=0.41)[0]) == 0.0
    assert float(video_vf_losses(latents, turned, cosine_margin=0.3)[0]) == pytest.approx(0.1, abs=1e-5)
    widest = (video_vf_losses(latents, turned, distance_margin=margin)[1] for margin in (0.0, 0.25, 2.0))
    exact, forgiving, zero = map(float, widest)
    assert exact > forgiving > zero == 0.0


def test_property_24_vf_in_chunks_is_vf() -> None:
    latents, features = (x.requires_grad_(True) for x in random_features())
    whole = video_vf_losses(latents, features, rows_at_once=0)
    (expected,) = torch.autograd.grad(sum(whole), latents)
    for rows in (7, 16, 47):
        chunked = video_vf_losses(latents, features, rows_at_once=rows)
        assert torch.allclose(torch.stack(chunked), torch.stack(whole), rtol=1e-5)
        assert torch.allclose(torch.autograd.grad(sum(chunked), latents)[0], expected, atol=1e-7)


def test_property_24_pooling_leaves_the_first_frame() -> None:
    features = torch.randn(2, 5, 9, 3, 4)
    pooled = pool_features(features)
    assert torch.equal(pooled[:, :, 0], features[:, :, 0])
    assert torch.allclose(pooled[:, :, 2], features[:, :, 5:9].mean(dim=2))
    assert pool_features(features[:, :, :1]).shape == (2, 5, 1, 3, 4)
    with pytest.raises(ValueError, match="features of 8 frames .* must be 4k.1"):
        pool_features(features[:, :, :8])


def test_property_24_vf_trains_the_encoder_and_not_dino(dino_folder: Path) -> None:
    dino = load_dinov2(dino_folder, CPU, grid=4)
    fsae = FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model)
    projection = LatentProjection(fsae.latent_channels, dino.channels)
    video = torch.rand(2, 3, 5, 32, 16) * 2 - 1
    features = pool_features(dino(video))
    assert features.shape == (2, 16, 2, 6, 3), "about 4 x 4 patches in the video's shape"
    frame = dino(video[1:, :, 3:4])
    assert torch.allclose(frame[0, :, 0], dino(video)[1, :, 3], atol=1e-5), "frame by frame"
    latents = projection(fsae.encode(video), features.shape[3:])
    sum(video_vf_losses(latents, features)).backward()
    assert fsae.encoder.conv_out.weight.grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in fsae.decoder.parameters())
    assert not features.requires_grad and all(p.grad is None and not p.requires_grad for p in dino.parameters())

    with pytest.raises(ValueError, match="nowhere is not a folder with DINOv2"):
        load_dinov2("nowhere", CPU)


def test_the_adaptive_weight_balances_gradients() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(3)
    losses = [(weight @ x).square().sum(), 0.01 * (weight @ x).square().sum()]
    assert float(adaptive_weight(*losses, weight)) == pytest.approx(100, rel=0.01)


def test_property_26_transforms_move_latents_as_pixels() -> None:
    torch.manual_seed(0)
    video = F.interpolate(torch.rand(2 * 5, 3, 2, 3), (32, 48), mode="bicubic").unflatten(0, (2, 5)).transpose(1, 2)
    # Latents that are 8 x 8 means of the video: turning and halving both is the same.
    latents = F.avg_pool3d(video, (1, 8, 8))
    for size, turns in (((2, 3), 0), ((3, 2), 1), ((8, 12), 0), ((6, 4), 3)):
        transform = LatentTransform(size, turns)
        of_video = F.avg_pool3d(transform.of_video(video, 8), (1, 8, 8))
        assert of_video.shape[3:] == transform.size
        difference = (of_video - transform.of_latents(latents)).abs().mean()
        turned_wrongly = LatentTransform(transform.size, transform.quarter_turns + 2).of_latents(latents)
        assert (of_video - turned_wrongly).abs().mean() > 4 * difference, transform


def test_property_26_transforms_are_drawn_by_sample_number() -> None:
    kinds = ("downscale", "upscale", "eq-vae")
    drawn = {kind: [draw_transform(kind, 1, n, (4, 6)) for n in range(400)] for kind in kinds}
    assert draw_transform("none", 1, 0, (4, 6)) is None
    assert {t.size for t in drawn["downscale"]} == {(2, 3), (1, 2)}
    assert {t.size for t in drawn["upscale"]} == {(8, 12)}
    assert drawn["eq-vae"][7] == draw_transform("eq-vae", 1, 7, (4, 6))
    roles = [t.role if t else "plain" for t in drawn["eq-vae"]]
    shares = [roles.count(role) / 400 for role in ("replacing", "before_encoding", "plain")]
    assert shares == pytest.approx([0.5, 0.125, 0.375], abs=0.07)
    assert all(t.quarter_turns in (1, 2, 3) for t in drawn["eq-vae"] if t and t.role == "replacing")
