"""What the video autoencoder is (paper section 2.2), and in which phase and memory it is trained."""

from dataclasses import dataclass
from typing import Literal

from megatron_fsvideo.config.compression import Compression


@dataclass(frozen=True)
class FSAEConfig:
    """architecture of the video autoencoder (the defaults are the paper's 64x64x4, 128 channels)"""

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024, 2048)
    """Channels per stage, pixel side first; n stages give a spatial factor of 2^(n-1)."""
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3, 3)
    """Blocks per encoder stage; with 0 at the pixel side the stem itself goes to the second stage."""
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3)
    """Blocks per decoder stage, pixel side first; with 0 there the head itself is the last up-sampling."""
    attention_stages: int = 4
    """How many of the innermost stages use EfficientViT blocks; the others use residual blocks."""
    decoder: Literal["causal", "standard", "lite"] = "causal"
    """Convolutions in time of the decoder: causal (phases 1-4); standard sees both ways; lite sees ahead only inside a
    latent's frames. The latter two attend to the first frame and get noise."""
    decoder_widths: tuple[int, ...] | None = None
    """Channels per decoder stage where they differ from widths (lite: fewer at the pixel side)."""
    upsampling: Literal["hybrid", "sub-pixel"] = "hybrid"
    """The decoder's ups in space: hybrid repeats pixels and convolves (DC-AE-sana's; a quarter of the weights),
    sub-pixel convolves to four times the channels. The two that double time are sub-pixel always."""
    noise_weight: float = 0.05
    """Weight of the noise in each residual block of a standard or lite decoder (paper: 0.05); 0 adds none."""
    noise_shape: Literal["spatial", "full"] = "spatial"
    """spatial: one map of noise for all channels and frames, which cannot flicker; full: each number has its own."""
    first_frame_head_dim: int = 64
    """Width of one head of the attention to the first frame."""
    first_frame_window: int = 32
    """Where a frame has more than this squared positions, attention to the first frame stays inside squares of it."""
    latent_channels: int = 128
    """Channels of the latents."""
    attention_head_dim: int = 32
    """Width of one head of the linear attention."""
    norm_affine: bool = True
    """Pixel norm with gain and bias (keeps DC-AE weights exact) or without."""
    norm_epsilon: float = 1e-5
    """Epsilon of the pixel norm."""
    residual_init: float = 1.0
    """Initial gain of the norm that ends each residual branch."""
    resample_init: float = 1.0
    """Factor on the initial weights of the down- and up-sampling convolutions."""
    patchify_init: bool = False
    """Start the stem as a copy of its cell's pixels into its first channels instead of randomly."""

    def __post_init__(self) -> None:
        stages = len(self.widths)
        if stages < 3:
            raise ValueError(f"widths needs at least 3 stages (the temporal factor 4 uses two), got {self.widths}")
        if len(self.encoder_depths) != stages or len(self.decoder_depths) != stages:
            raise ValueError(
                f"widths has {stages} stages, but encoder_depths {len(self.encoder_depths)} "
                f"and decoder_depths {len(self.decoder_depths)}"
            )
        if self.decoder_widths and len(self.decoder_widths) != stages:
            raise ValueError(
                f"decoder_widths needs one width for each of the {stages} stages, got {self.decoder_widths}"
            )
        if self.noise_weight < 0 or self.first_frame_window < 1:
            raise ValueError(
                f"noise_weight {self.noise_weight} must not be negative, first_frame_window {self.first_frame_window} "
                "must be positive"
            )
        if not self.norm_affine and self.residual_init != 1.0:
            raise ValueError(
                f"residual_init {self.residual_init} is the norm's gain, which norm_affine off does not have"
            )
        if not 0 <= self.attention_stages <= stages:
            raise ValueError(f"attention_stages must be in 0..{stages}, got {self.attention_stages}")

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Channels per decoder stage, pixel side first."""
        return self.decoder_widths or self.widths

    @property
    def compression(self) -> Compression:
        """Pixels and frames per latent position."""
        return Compression(self.spatial_factor, self.temporal_factor)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, per side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first."""
        return 4


@dataclass(frozen=True)
class FSAEPhaseConfig:
    """training phase of the autoencoder, and its share of images"""

    phase: int = 1
    """What is trained, by which losses: 1 pixels, 2 + adversary, 3 large videos, 4 + alignment; then the decoder alone:
    5 Standard, 6 Lite."""
    image_fraction: float = 0.0
    """Share of batches that are single frames."""
    image_warmup_iters: int = 0
    """Iterations on single frames only, before the temporal taps are remapped and video begins."""
    image_batch_size: int = 16
    """Samples of a single-frame batch."""

    def __post_init__(self) -> None:
        if self.phase not in range(1, 7):
            raise ValueError(f"phase must be 1 to 6, got {self.phase}")
        if self.image_warmup_iters and self.phase > 1:
            raise ValueError(
                f"image_warmup_iters {self.image_warmup_iters} starts a model from images, which phase {self.phase} "
                "no longer does: set it to 0"
            )

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder still changes; from phase 5 on it is frozen, so that latents stay what they are."""
        return self.phase <= 4

    @property
    def has_adversary(self) -> bool:
        """Whether the phase has a discriminator (where its weight is not 0)."""
        return self.phase >= 2

    @property
    def has_alignment(self) -> bool:
        """Whether the phase has the Video VF loss (where its weight is not 0)."""
        return self.phase == 4


@dataclass(frozen=True)
class FSAEMemoryConfig:
    """memory of large clips: tiles, slices and patches"""

    encoder_tile: int = 0
    """Side in pixels of the tiles in which the encoder's outer stages run, recomputed one by one in the backward pass,
    with exact gradients; 0 runs them whole."""
    encoder_slice: int = 0
    """Latent frames that the encoder takes at a time instead (for small frames); 0 takes all."""
    patch_latents: int = 0
    """Latent frames of the patch that the decoder's outer stages and the losses see; 0 takes all."""
    patch_rows: int = 0
    """Rows of the patch, in cells of 8 pixels; the outer 7 at each cut are decoded for their neighbours only."""
    patch_columns: int = 0
    """Columns of the patch, likewise."""

    def __post_init__(self) -> None:
        sizes = (self.encoder_tile, self.encoder_slice, self.patch_latents, self.patch_rows, self.patch_columns)
        if min(sizes) < 0 or (self.encoder_tile and self.encoder_slice):
            raise ValueError(
                "encoder_tile, encoder_slice, patch_latents, patch_rows and patch_columns must not be negative, and "
                f"only one of the first two can be given: got {sizes}"
            )

    @property
    def decodes_patch(self) -> bool:
        """Whether the decoder's outer stages see a patch only."""
        return max(self.patch_latents, self.patch_rows, self.patch_columns) > 0
