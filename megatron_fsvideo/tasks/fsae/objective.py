"""The autoencoder's loss (paper sections 2.2.1 and 2.2.2). All terms are means over all elements.

L_ae    = L1 + 0.1 LPIPS + 0.1 L_GAN              L_GAN from phase 2 on
L_total = L_ae + 0.5 (L_v-mcos + L_v-mdms)        phase 4, equation 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.config import FSAEJob, ReconstructionLossConfig
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.losses.latent_regularizers import LatentTransform
from megatron_fsvideo.losses.lpips import sliced_perceptual_loss
from megatron_fsvideo.losses.video_vf import adaptive_weight, pool_features, video_vf_losses
from megatron_fsvideo.models.frozen import efficientnet_features
from megatron_fsvideo.models.frozen.dinov2 import DINOv2Features, load_dinov2
from megatron_fsvideo.models.frozen.efficientnet_features import EfficientNetFeatures
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss, build_perceptual_loss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.parallel.seeds import sample_generator
from megatron_fsvideo.tasks.fsae.adversary import Adversary
from megatron_fsvideo.tasks.fsae.forward import ForwardOutput

SCALES = (2, 4)


class FSAEObjective:
    """The weighted losses of a job's phase.

    Attributes:
        dino: vision model with whose features the latents are aligned in phase 4.
    """

    def __init__(self, job: FSAEJob, device: torch.device) -> None:
        self.job = job
        self.perceptual: PerceptualLoss | None = None
        if job.losses.perceptual_weight > 0:
            self.perceptual = build_perceptual_loss(job.perceptual, device)
        self.dino: DINOv2Features | EfficientNetFeatures | None = None
        if job.uses_vf:
            if job.alignment.vf_encoder_path is None:
                raise ValueError("phase 4 aligns the latents with DINOv2: give --vf-encoder-path, or --vf-weight 0")
            self.dino = load_vision_features(job.alignment.vf_encoder_path, device, job.alignment.vf_grid)

    def features(self, video: Tensor) -> Tensor | None:
        """Vision features [b, e, t, rows, columns] for the latents of a video [b, 3, f, h, w]; None without VF."""
        return None if self.dino is None else pool_features(self.dino(video), self.job.model.temporal_factor)

    def __call__(
        self,
        output: ForwardOutput,
        video: Tensor,
        fsae: FSAE,
        *,
        features: Tensor | None = None,
        transform: LatentTransform | None = None,
        adversary: Adversary | None = None,
        shards: FrameShards | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, and its unweighted parts by name. With `shards` the clip's loss is the processes' mean.

        Args:
            video: the whole clip, [b, 3, f, h, w].
            fsae: autoencoder; the adaptive weight uses the gradient at its encoder's last layer.
            features: result of `features`.
            transform: transform that made `output.transformed`.
            adversary: None leaves the adversarial loss out.
            shards: frames of the clip that `output` has; None for all.
        """
        loss, parts = torch.zeros((), device=video.device), {}
        if output.reconstruction is not None:
            target = video if shards is None else shards.of(video)
            target = target if output.region is None else output.region.of(target)
            loss, parts = self._reconstruction(output.reconstruction, target)
            if shards is not None:
                loss, parts = shards.weight * loss, {name: shards.weight * value for name, value in parts.items()}
        if transform is not None:
            assert output.transformed is not None
            target = transform.of_video(video, fsae.spatial_factor)
            regularized, of_transformed = self._reconstruction(output.transformed, target)
            parts |= {f"transformed_{name}": value for name, value in of_transformed.items()}
            is_added = transform.role == "added"
            loss = loss + (self.job.alignment.latent_regularizer_weight if is_added else 1.0) * regularized
        if features is not None:
            aligned, of_aligned = self._alignment(loss, output, features, fsae)
            loss, parts = loss + aligned, parts | of_aligned
        if adversary is not None:
            parts["gan"] = adversary.generator_loss(whole_reconstruction(output, shards))
            loss = loss + self.job.adversary.gan_weight * parts["gan"]
        if self.job.losses.latent_penalty > 0:
            latents = output.latents if shards is None else shards.join_latents(output.latents)
            loss = loss + self.job.losses.latent_penalty * latent_penalty(latents)
        return loss, {name: value.detach() for name, value in parts.items()}

    def _reconstruction(self, reconstruction: Tensor, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        frames = self.job.perceptual.perceptual_frames
        return reconstruction_loss(reconstruction, video, self.job.losses, self.perceptual, frames)

    def _alignment(
        self, reconstruction: Tensor, output: ForwardOutput, features: Tensor, fsae: FSAE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.job.alignment
        matching, distances = video_vf_losses(
            output.projected, features, config.vf_cosine_margin, config.vf_distance_margin, config.vf_rows
        )
        weight = config.vf_weight
        if config.vf_adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(reconstruction, matching + distances, fsae.encoder.conv_out.weight)
        return weight * (matching + distances), {"vf_cosine": matching, "vf_distance": distances}


def load_vision_features(path: str, device: torch.device, grid: int) -> DINOv2Features | EfficientNetFeatures:
    """Load DINOv2 from a folder, or by name its stand-in from a package; raises the errors of `load_dinov2`."""
    if path == efficientnet_features.NAME:
        return EfficientNetFeatures(grid).to(device)
    return load_dinov2(path, device, grid)


def whole_reconstruction(output: ForwardOutput, shards: FrameShards | None) -> Tensor:
    """Gather the clip's reconstructed frames (of its patch, if one was decoded) from all processes, with gradients."""
    assert output.reconstruction is not None
    return output.reconstruction if shards is None else shards.join(output.reconstruction)


def reconstruction_loss(
    reconstruction: Tensor,
    video: Tensor,
    weights: ReconstructionLossConfig,
    perceptual: PerceptualLoss | None,
    perceptual_frames: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its unweighted parts, by name. Both videos [b, 3, f, h, w]; computed in at least fp32."""
    reconstruction = reconstruction.to(torch.promote_types(reconstruction.dtype, torch.float32))
    parts = {"l1": F.l1_loss(reconstruction, video)}
    loss = weights.l1_weight * parts["l1"]
    if weights.gradient_weight > 0:
        parts["gradient"] = gradient_l1(reconstruction, video)
        loss = loss + weights.gradient_weight * parts["gradient"]
    if weights.multiscale_weight > 0:
        parts["multiscale"] = multiscale_l1(reconstruction, video)
        loss = loss + weights.multiscale_weight * parts["multiscale"]
    if weights.ssim_weight > 0:
        parts["ssim"] = 1 - ssim(reconstruction, video).mean()
        loss = loss + weights.ssim_weight * parts["ssim"]
    if perceptual is not None:
        parts["perceptual"] = sliced_perceptual_loss(perceptual, reconstruction, video, perceptual_frames)
        loss = loss + weights.perceptual_weight * parts["perceptual"]
    return loss, {name: part.detach() for name, part in parts.items()}


def gradient_l1(reconstruction: Tensor, video: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, rows + columns. It favours sharp edges."""
    error = reconstruction - video
    return error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()


def multiscale_l1(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Sum of the L1 distances of frames averaged over 2x2 and over 4x4 pixels. It favours right colours of areas."""
    error = reconstruction - video
    return torch.stack([F.avg_pool3d(error, (1, scale, scale)).abs().mean() for scale in SCALES]).sum()


def latent_penalty(latents: Tensor) -> Tensor:
    """Excess of the latents' mean square over 1, a scalar.

    No other loss limits their scale, and Muon's steps do not shrink with the gradient. Without this penalty the scale
    grows without bound, and residual branches of unit size lose their effect.
    """
    return torch.relu(latents.float().square().mean() - 1)


def draw_latent_noise(seed: int, first: int, shape: tuple[int, ...], strength: float) -> Tensor:
    """Draw noise [b, c, t, h, w] for the latents of samples first, first + 1, ..., each sample at its own level.

    Args:
        shape: (b, c, t, h, w).
        strength: upper bound of the levels, which are uniform in [0, strength].
    """
    rows = []
    for index in range(first, first + shape[0]):
        generator = sample_generator(seed, index, 0, "latent_noise")
        level = strength * torch.rand((), generator=generator)
        rows.append(level * torch.randn(shape[1:], generator=generator))
    return torch.stack(rows)
