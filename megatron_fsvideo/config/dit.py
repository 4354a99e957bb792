"""What the DiT is: the shape of its network (paper section 2.3) and of its diffusion process (section 3)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DiTConfig:
    """architecture of the base DiT and the refiner (the defaults are the paper's 14B)"""

    num_layers: int = 40
    """Number of transformer layers."""
    hidden_size: int = 5120
    """Width of the token stream."""
    num_attention_heads: int = 40
    """Number of attention heads."""
    ffn_hidden_size: int = 13824
    """Width of the feed-forward layer (tanh GELU, not gated)."""
    latent_channels: int = 128
    """Channels of the autoencoder's latents."""
    mask_channels: int = 4
    """Channels of the condition mask, one per pixel frame of a latent frame."""
    patch_size: tuple[int, int, int] = (1, 1, 1)
    """Latent frames, rows and columns per token: 1 1 1 is the paper's, 1 2 2 Wan's."""
    text_embed_dim: int = 4096
    """Width of the text encoder's output; 0 builds no text attention."""
    image_embed_dim: int = 1280
    """Width of the image encoder's output; 0 builds no image attention."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of every norm in the blocks and the head."""
    q_norm_init: float = 1.0
    """Initial gain of the query RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding, on each of the three axes."""
    rope_scale_hw: float = 1.0
    """Rows and columns are divided by this before the rotary embedding."""
    layer_memory: bool = True
    """Let keys and values attend to a learned mix of all earlier layers' inputs (paper eq. 6-8)."""
    layer_memory_norm: Literal["raw", "normalized"] = "raw"
    """Mix the raw hidden states and then norm (the paper's), or norm each state before the mix."""
    layer_memory_init: float = 0.9
    """Softmax weight of the latest hidden state at the start; 1.0 starts exactly as without layer memory."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} = {self.head_dim}: "
                "rotary embedding over three axes needs an even head size of at least 6"
            )
        if self.text_embed_dim == 0 and self.image_embed_dim == 0:
            raise ValueError("text_embed_dim and image_embed_dim are both 0: nothing would condition the model")
        if not 0.0 < self.layer_memory_init <= 1.0:
            raise ValueError(f"layer_memory_init must be in (0, 1], got {self.layer_memory_init}")
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be positive, got {self.patch_size}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def in_channels(self) -> int:
        """Channels of the model's input: noisy latents, mask, condition latents."""
        return 2 * self.latent_channels + self.mask_channels

    @property
    def patch_volume(self) -> int:
        """Latent positions per token."""
        t, h, w = self.patch_size
        return t * h * w


@dataclass(frozen=True)
class DiffusionConfig:
    """flow matching: noise levels, target, loss and dropped conditions"""

    sigma_mean: float = 0.0
    """Mean of the logit-normal distribution of sigma."""
    sigma_std: float = 1.0
    """Standard deviation of the logit-normal distribution of sigma."""
    sigma_shift: float = 1.0
    """Timestep shift a: sigma' = a sigma / (1 + (a - 1) sigma); sampling uses the same shift."""
    prediction_type: Literal["velocity", "sample"] = "velocity"
    """What the model puts out: the velocity noise - latents (the paper's), or the clean latents."""
    loss_type: Literal["pseudo_huber", "ict", "rfpp", "mse"] = "pseudo_huber"
    """Per-sample pseudo-Huber loss (the paper's) with the constant huber_c, 0.00054 (ict: Song and Dhariwal 2023) or
    0.00054 times the root of a sample's number of elements (rfpp: Lee et al. 2024); or the squared error."""
    huber_c: float = 0.03
    """The constant of loss type pseudo_huber, in units of the per-element RMS error."""
    text_dropout: float = 0.1
    """Share of samples whose text is replaced by the encoding of the empty prompt."""
    image_dropout: float = 0.0
    """Share of clips whose first frame is not given (mask, condition latents and image embedding are zero), for text
    to video; clips of one frame, for text to image, are never given it."""
    repeat_condition: bool = False
    """Repeat the first frame's latent over all condition frames instead of zeros (the paper has zeros)."""

    def __post_init__(self) -> None:
        if self.sigma_std <= 0 or self.sigma_shift <= 0:
            raise ValueError(f"sigma_std {self.sigma_std} and sigma_shift {self.sigma_shift} must be positive")
        for name in ("text_dropout", "image_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
