"""Configuration of the DiT: network (paper section 2.3) and diffusion process (section 3)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config.rules import Checked, Count, Layers, Positive, PositiveInt, Share


@dataclass(frozen=True)
class DiTConfig(Checked):
    """architecture of the base DiT and the refiner (the defaults are the paper's 14B)"""

    num_layers: Layers = 40
    """Number of transformer layers."""
    hidden_size: PositiveInt = 5120
    """Width of the token stream."""
    num_attention_heads: PositiveInt = 40
    """Number of attention heads."""
    ffn_hidden_size: PositiveInt = 13824
    """Width of the feed-forward layer (tanh GELU, no gate)."""
    latent_channels: PositiveInt = 128
    """Number of channels of the autoencoder's latents."""
    mask_channels: PositiveInt = 4
    """Number of channels of the condition mask: one for each pixel frame of a latent frame."""
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)
    """Latent frames, rows and columns per token. The paper uses 1 1 1, Wan uses 1 2 2."""
    text_embed_dim: Count = 4096
    """Width of the text encoder's output. 0 builds a model without attention to text."""
    image_embed_dim: Count = 1280
    """Width of the image encoder's output. 0 builds a model without attention to image features."""
    freq_dim: Annotated[int, Meta(ge=2)] = 256
    """Width of the sinusoidal timestep embedding."""
    layernorm_epsilon: Positive = 1e-6
    """Epsilon of all norms in the blocks and in the head."""
    q_norm_init: float = 1.0
    """Initial gain of the query RMSNorm."""
    rotary_base: Positive = 10000.0
    """Base of the rotary position embedding, for each of the three axes."""
    rope_scale_hw: Positive = 1.0
    """Row and column positions are divided by this number before the rotary embedding."""
    layer_memory: bool = True
    """Compute keys and values from a learned mix of the inputs of all earlier layers (paper eq. 6-8)."""
    layer_memory_norm: Literal["raw", "normalized"] = "raw"
    """Order of mixing and norm. raw mixes hidden states, then applies the norm (paper); normalized applies the norm to
    each hidden state, then mixes."""
    layer_memory_init: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Initial softmax weight of the latest hidden state. With 1.0 the model starts exactly as without layer memory,
    and its routers never learn: their gradient vanishes."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
class DiffusionConfig(Checked):
    """flow matching: noise levels, target, loss, dropout of conditions"""

    sigma_mean: float = 0.0
    """Mean of the logit-normal distribution of the noise level sigma."""
    sigma_std: Positive = 1.0
    """Standard deviation of the logit-normal distribution of the noise level sigma."""
    sigma_shift: Positive = 1.0
    """Timestep shift a: sigma becomes a sigma / (1 + (a - 1) sigma). Sampling uses the same shift by default."""
    prediction_type: Literal["velocity", "sample"] = "velocity"
    """Output of the model: velocity is noise - latents (paper); sample is the clean latents."""
    loss_type: Literal["pseudo_huber", "ict", "rfpp", "mse"] = "pseudo_huber"
    """Loss of each sample. pseudo_huber uses the constant huber_c (paper); ict uses 0.00054 (Song and Dhariwal 2023);
    rfpp uses 0.00054 times the square root of the number of elements (Lee et al. 2024); mse is the squared error."""
    huber_c: Positive = 0.03
    """Constant of loss type pseudo_huber, in units of the root mean square error of an element."""
    text_dropout: Share = 0.1
    """Share of samples whose text is replaced by the empty prompt."""
    image_dropout: Share = 0.0
    """Share of clips whose first frame is hidden from the model, which trains text to video: mask, condition latents
    and image embedding are zero. Images are always hidden: the condition would be the target."""
    repeat_condition: bool = False
    """Fill all condition frames with the latent of the first frame instead of zeros (paper: zeros)."""
