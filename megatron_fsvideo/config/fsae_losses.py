"""The autoencoder's losses: reconstruction, and in later phases adversary, alignment and latent regularisation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config.rules import Checked, Count, Layers, NonNegative, PathText, PositiveInt


@dataclass(frozen=True)
class ReconstructionLossConfig(Checked):
    """reconstruction losses, and regularisation of the latents"""

    l1_weight: NonNegative = 1.0
    """Weight of the mean absolute error."""
    perceptual_weight: NonNegative = 0.1
    """Weight of the perceptual loss (paper: 0.1)."""
    gradient_weight: NonNegative = 0.0
    """Weight of the L1 distance of spatial image gradients."""
    multiscale_weight: NonNegative = 0.0
    """Weight of the L1 distance of frames that are averaged over 2x2 and over 4x4 pixels."""
    ssim_weight: NonNegative = 0.0
    """Weight of 1 - SSIM (Zhao et al. 2017), which keeps texture that L1 averages away."""
    latent_penalty: NonNegative = 0.0
    """Weight of max(0, mean square of the latents - 1), which keeps their scale near 1 at large learning rates."""
    latent_noise: NonNegative = 0.0
    """Largest noise on latents in training. Each sample's Gaussian noise has a strength from uniform(0, this number),
    in units of the latents' standard deviation."""


@dataclass(frozen=True)
class PerceptualLossConfig(Checked):
    """the frozen network behind the perceptual loss"""

    perceptual_trunk: Literal["none", "vgg16", "efficientnet-lite0"] = "vgg16"
    """Frozen network whose features the perceptual loss compares."""
    perceptual_trunk_path: PathText | None = None
    """File with the weights of the network, if it does not come with a package."""
    perceptual_linear_path: PathText | None = None
    """File with the lin weights of LPIPS, if the network's file does not hold them."""
    perceptual_frames: Count = 0
    """Frames whose perceptual loss is computed at a time, which limits its memory. 0 takes all frames."""


@dataclass(frozen=True)
class AdversaryConfig(Checked):
    """the discriminator of phases 2 to 6"""

    gan_weight: NonNegative = 0.1
    """Weight of the adversarial loss from phase 2 on (paper: 0.1). 0 trains without a discriminator."""
    discriminator_width: PositiveInt = 64
    """Number of channels after the first layer of each discriminator."""
    discriminator_scales: Layers = 3
    """Number of discriminators. Each works on half the frames, rows and columns of the one before."""
    discriminator_layers: Layers = 3
    """Number of layers of each discriminator that halve rows and columns."""
    discriminator_warmup_iters: Count = 0
    """Iterations at the start in which only the discriminator is trained."""
    r1_gamma: NonNegative = 10.0
    """Weight gamma of the R1 penalty, gamma / 2 times the squared gradient of the discriminator at real videos."""
    r1_interval: PositiveInt = 16
    """Iterations between R1 penalties. Each is multiplied by this number."""


@dataclass(frozen=True)
class AlignmentConfig(Checked):
    """alignment of the latents in phase 4 (Video VF), and other regularisations of the paper"""

    vf_weight: NonNegative = 0.5
    """Weight of both Video VF losses in phase 4 (paper: 0.5). 0 trains without them."""
    vf_cosine_margin: Annotated[float, Meta(ge=0, le=2)] = 0.5
    """Margin m_1 of the token-wise loss: smaller cosine distances cost nothing (paper: 0.5)."""
    vf_distance_margin: Annotated[float, Meta(ge=0, le=2)] = 0.25
    """Margin m_2 of the pair-wise loss: smaller differences of similarity cost nothing (paper: 0.25)."""
    vf_encoder_path: PathText | None = None
    """Folder with DINOv2 in the format of transformers (paper: DINOv2; VA-VAE: its large size), or efficientnet-lite0,
    a substitute that comes as a package."""
    vf_grid: PositiveInt = 16
    """Number of DINOv2 patches per side of a square frame. Other shapes get about as many patches in all."""
    vf_rows: PositiveInt = 1024
    """Rows of the token similarity matrices that are computed at a time, which limits their memory."""
    vf_adaptive: bool = False
    """Multiply vf_weight by the ratio of the two losses' gradient norms at the encoder's last layer, as VA-VAE does."""
    latent_regularizer: Literal["none", "downscale", "upscale", "eq-vae"] = "none"
    """Regularisation of the latents from the paper's Table 1, instead of Video VF or in addition to it."""
    latent_regularizer_weight: NonNegative = 0.25
    """Weight of the loss on downscaled or upscaled latents. eq-vae replaces the plain loss and has no weight."""
