"""Configuration of the video autoencoder (paper section 2.2), of its training phase and of its memory."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config.compression import Compression
from megatron_fsvideo.config.rules import Checked, Count, Depth, NonNegative, Positive, PositiveInt, Share


@dataclass(frozen=True)
class FSAEConfig(Checked):
    """architecture of the video autoencoder (the defaults are the paper's 64x64x4, 128 channels)"""

    widths: tuple[PositiveInt, ...] = (128, 256, 512, 512, 1024, 1024, 2048)
    """Number of channels of each stage, pixel side first. n stages give a spatial factor of 2^(n-1)."""
    encoder_depths: tuple[Depth, ...] = (2, 2, 2, 3, 3, 3, 3)
    """Number of blocks of each encoder stage, pixel side first. If the first is 0, the stem leads to the second
    stage."""
    decoder_depths: tuple[Depth, ...] = (3, 3, 3, 3, 3, 3, 3)
    """Number of blocks of each decoder stage, pixel side first. If the first is 0, the head does the last
    upsampling."""
    attention_stages: Count = 4
    """Number of innermost stages that use EfficientViT blocks. The others use residual blocks."""
    decoder: Literal["causal", "standard", "lite"] = "causal"
    """Kind of decoder. causal (phases 1 to 4) sees earlier frames only; standard sees earlier and later frames; lite
    sees later frames only within one latent frame. standard and lite attend to the first frame and add noise."""
    decoder_widths: tuple[PositiveInt, ...] | None = None
    """Number of channels of each decoder stage, pixel side first. None takes widths."""
    upsampling: Literal["hybrid", "sub-pixel"] = "hybrid"
    """Spatial upsampling of the decoder. hybrid repeats pixels, then convolves (DC-AE of Sana; a quarter of the
    weights); sub-pixel convolves to four times the channels. The two layers that double time always use sub-pixel."""
    noise_weight: NonNegative = 0.05
    """Weight of the noise in each residual block of a standard or lite decoder (paper: 0.05). 0 adds no noise."""
    noise_shape: Literal["spatial", "full"] = "spatial"
    """spatial: one map of noise for all channels and frames, which cannot flicker; full: independent noise
    everywhere."""
    first_frame_head_dim: PositiveInt = 64
    """Width of one head of the attention to the first frame."""
    first_frame_window: PositiveInt = 32
    """Side of the square windows of the attention to the first frame. Smaller frames use no windows."""
    latent_channels: PositiveInt = 128
    """Number of channels of the latents."""
    attention_head_dim: PositiveInt = 32
    """Width of one head of the linear attention."""
    norm_affine: bool = True
    """Use a pixel norm with gain and bias (needed to keep DC-AE weights exact)."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of the pixel norm."""
    residual_init: float = 1.0
    """Initial gain of the norm that ends each residual branch."""
    resample_init: NonNegative = 1.0
    """Factor of the initial weights of the down- and upsampling convolutions."""
    patchify_init: bool = False
    """Initialise the stem so that it copies the pixels of its cell into its first channels, instead of randomly."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if not self.norm_affine and self.residual_init != 1.0:
            raise ValueError(
                f"residual_init {self.residual_init} is the norm's gain, which norm_affine off does not have"
            )
        if self.attention_stages > stages:
            raise ValueError(f"attention_stages {self.attention_stages} is more than the {stages} stages of widths")

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
class FSAEPhaseConfig(Checked):
    """training phase of the autoencoder, and its share of images"""

    phase: Annotated[int, Meta(ge=1, le=6)] = 1
    """Training phase. 1: reconstruction; 2: with a discriminator; 3: large videos; 4: with alignment; 5 and 6: only the
    Standard and the Lite decoder, with a frozen encoder."""
    image_fraction: Share = 0.0
    """Share of batches that consist of single frames."""
    image_warmup_iters: Count = 0
    """Iterations at the start that train on single frames only. Then the temporal kernels are rearranged for video."""
    image_batch_size: PositiveInt = 16
    """Samples per optimizer step of a single-frame batch, over all ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_warmup_iters and self.phase > 1:
            raise ValueError(
                f"image_warmup_iters {self.image_warmup_iters} starts a model from images, which phase {self.phase} "
                "no longer does: set it to 0"
            )

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder is trained. From phase 5 on it is frozen, so that latents do not change."""
        return self.phase <= 4

    @property
    def has_adversary(self) -> bool:
        """Whether the phase has a discriminator, if the weight of its loss is not 0."""
        return self.phase >= 2

    @property
    def has_alignment(self) -> bool:
        """Whether the phase has the Video VF loss, if its weight is not 0."""
        return self.phase == 4


@dataclass(frozen=True)
class FSAEMemoryConfig(Checked):
    """memory of large clips: tiles, slices and patches"""

    encoder_tile: Count = 0
    """Side of the tiles of the encoder's outer stages in pixels. The backward pass recomputes them one at a time;
    gradients are exact. 0 uses no tiles."""
    encoder_slice: Count = 0
    """Latent frames that the encoder processes at a time, instead of tiles (for small frames). 0 processes all at
    once."""
    patch_latents: Count = 0
    """Latent frames of the patch on which the decoder's outer stages and the losses work. 0 takes all."""
    patch_rows: Count = 0
    """Rows of the patch in cells of 8 pixels. The outer 7 cells at each cut only give context and enter no loss. 0
    takes all rows."""
    patch_columns: Count = 0
    """Columns of the patch in cells of 8 pixels, cut in the same way. 0 takes all columns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_tile and self.encoder_slice:
            raise ValueError(
                f"encoder_tile {self.encoder_tile} and encoder_slice {self.encoder_slice} exclude each other: "
                "set one to 0"
            )

    @property
    def decodes_patch(self) -> bool:
        """Whether the decoder's outer stages see only a patch."""
        return max(self.patch_latents, self.patch_rows, self.patch_columns) > 0
