"""The autoencoder's losses: reconstruction, and what later phases add: adversary, alignment, latent regularisation."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """weights of the reconstruction losses, and what keeps latents small and robust"""

    l1_weight: float = 1.0
    """Weight of the mean absolute error."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual loss (paper: 0.1)."""
    gradient_weight: float = 0.0
    """Weight of the L1 distance of spatial image gradients."""
    multiscale_weight: float = 0.0
    """Weight of the L1 distance of 2x and 4x averaged frames."""
    ssim_weight: float = 0.0
    """Weight of 1 - SSIM (Zhao et al. 2017): it rewards texture that L1 averages away."""
    latent_penalty: float = 0.0
    """Weight of max(0, mean square of the latents - 1): it keeps their scale near 1 where the steps are large."""
    latent_noise: float = 0.0
    """In training, latents get Gaussian noise of uniform(0, this) of their standard deviation before decoding."""


@dataclass(frozen=True)
class PerceptualLossConfig:
    """the frozen network behind the perceptual loss"""

    perceptual_trunk: Literal["none", "vgg16", "efficientnet-lite0"] = "vgg16"
    """Frozen network whose features the perceptual loss compares."""
    perceptual_trunk_path: str | None = None
    """Weights of the trunk, where it does not come with a package."""
    perceptual_linear_path: str | None = None
    """LPIPS's lin weights, where the trunk's file does not have them."""
    perceptual_frames: int = 0
    """Frames whose perceptual loss is computed at a time, to bound its memory; 0 takes all."""


@dataclass(frozen=True)
class AdversaryConfig:
    """the discriminator of phases 2 to 6"""

    gan_weight: float = 0.1
    """Weight of the adversarial loss from phase 2 on (paper: 0.1); 0 trains without a discriminator."""
    discriminator_width: int = 64
    """Channels after each discriminator's first layer."""
    discriminator_scales: int = 3
    """Discriminators, each on half the frames and sides of the one before."""
    discriminator_layers: int = 3
    """Layers of each discriminator that halve the sides."""
    discriminator_warmup_iters: int = 0
    """Iterations at the start in which the discriminator learns alone."""
    r1_gamma: float = 10.0
    """Weight of half the R1 penalty on the discriminator's gradient at real videos."""
    r1_interval: int = 16
    """Iterations from one R1 penalty to the next, which counts as many times."""

    def __post_init__(self) -> None:
        if self.gan_weight < 0 or self.r1_gamma < 0 or self.r1_interval < 1:
            raise ValueError(
                f"gan_weight {self.gan_weight} and r1_gamma {self.r1_gamma} must not be negative, r1_interval "
                f"{self.r1_interval} must be at least 1"
            )
        sizes = (self.discriminator_width, self.discriminator_scales, self.discriminator_layers)
        if min(sizes) < 1:
            raise ValueError(
                f"discriminator_width, discriminator_scales and discriminator_layers must be at least 1, got {sizes}"
            )


@dataclass(frozen=True)
class AlignmentConfig:
    """what shapes the latent space in phase 4: Video VF, or one of the regularisations it is compared with"""

    vf_weight: float = 0.5
    """Weight of both Video VF losses in phase 4 (paper: 0.5); 0 trains without."""
    vf_cosine_margin: float = 0.5
    """Cosine distance that the token-wise loss forgives (m_1; paper: 0.5)."""
    vf_distance_margin: float = 0.25
    """Difference of similarities that the pair-wise loss forgives (m_2; paper: 0.25)."""
    vf_encoder_path: str | None = None
    """Folder with DINOv2 as transformers saves it (paper: DINOv2; VA-VAE: its large size); efficientnet-lite0 is a
    stand-in that comes as a package."""
    vf_grid: int = 16
    """DINOv2 patches per side of a square frame; other shapes get about as many."""
    vf_rows: int = 1024
    """Rows of the token similarity matrices computed at a time, to bound their memory."""
    vf_adaptive: bool = False
    """Multiply vf_weight by the ratio of both losses' gradients at the encoder's last layer, as VA-VAE does."""
    latent_regularizer: Literal["none", "downscale", "upscale", "eq-vae"] = "none"
    """A regularisation of Table 1 instead of Video VF, or beside it."""
    latent_regularizer_weight: float = 0.25
    """Weight of the loss on downscaled or upscaled latents; eq-vae replaces the plain loss instead."""
