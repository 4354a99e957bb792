"""Floating-point operations of the DiT, counted as 2 per multiply-add of its matrix products."""

from megatron_fsvideo.config import DiTConfig


def dit_forward_flops(model: DiTConfig, num_tokens: int, context_tokens: int) -> float:
    """Operations of one sample's forward pass.

    Args:
        num_tokens: latent tokens.
        context_tokens: text and image rows that the cross-attention reads.
    """
    hidden = model.hidden_size
    linears = num_tokens * (4 + 2) * hidden**2 + context_tokens * 2 * hidden**2  # q k v o, cross q o; cross k v
    feed_forward = num_tokens * 2 * hidden * model.ffn_hidden_size
    attention = 2 * num_tokens * (num_tokens + context_tokens) * hidden
    patches = num_tokens * hidden * (model.in_channels + model.latent_channels) * model.patch_volume
    return 2.0 * (model.num_layers * (linears + feed_forward + attention) + patches)


def dit_training_flops(model: DiTConfig, num_tokens: int, context_tokens: int) -> float:
    """Operations of one sample's forward and backward pass; recomputation is not counted."""
    return 3 * dit_forward_flops(model, num_tokens, context_tokens)
