"""What a checkpoint of the original Wan2.1-I2V consists of, written out beside the code that is tested."""

from typing import Any

from megatron_fsvideo.config import DiTConfig


def wan_config(config: DiTConfig) -> dict[str, Any]:
    """Its config.json."""
    return {
        "_class_name": "WanModel",
        "model_type": "i2v",
        "dim": config.hidden_size,
        "ffn_dim": config.ffn_hidden_size,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "out_dim": config.latent_channels,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "text_len": 512,
        "eps": config.layernorm_epsilon,
    }


def wan_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Its tensors' names and shapes."""
    d, f, e = config.hidden_size, config.ffn_hidden_size, config.image_embed_dim
    outputs = config.latent_channels * config.patch_volume
    shapes = {
        "patch_embedding.weight": (d, config.in_channels, *config.patch_size),
        "patch_embedding.bias": (d,),
        "head.modulation": (1, 2, d),
    }
    linears = {
        "time_embedding.0": (d, config.freq_dim),
        "time_embedding.2": (d, d),
        "time_projection.1": (6 * d, d),
        "text_embedding.0": (d, config.text_embed_dim),
        "text_embedding.2": (d, d),
        "img_emb.proj.1": (e, e),
        "img_emb.proj.3": (d, e),
        "head.head": (outputs, d),
    }
    norms = {"img_emb.proj.0": e, "img_emb.proj.4": d}
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        names = [f"self_attn.{n}" for n in "qkvo"] + [f"cross_attn.{n}" for n in ("q", "k", "v", "o", "k_img", "v_img")]
        linears |= {f"{block}.{name}": (d, d) for name in names}
        linears |= {f"{block}.ffn.0": (f, d), f"{block}.ffn.2": (d, f)}
        norms[f"{block}.norm3"] = d
        gains = ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k")
        shapes |= {f"{block}.{gain}.weight": (d,) for gain in (*gains, "cross_attn.norm_k_img")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes
