"""Converts config.json of diffusers' WanTransformer3DModel and of the original Wan2.1 to our architecture and back.

Both lack some of our fields, which then have Wan2.1's value (`_FIXED`); the original also leaves out what its weights'
shapes say (patch, widths of the encoders).
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.config.rules import Positive, allowed, shown

Shapes = dict[str, tuple[int, ...]]
_SizeField = Annotated[int, Meta(ge=1, le=2**31)]

DIFFUSERS_CLASS = "WanTransformer3DModel"
WAN_CLASS = "WanModel"
_WAN_PATCH = (1, 2, 2)
# Their files cannot express these fields, which must therefore have Wan2.1's values.
_FIXED = {"rotary_base": 10000.0, "rope_scale_hw": 1.0, "layer_memory": False}
_DIFFUSERS_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "pos_embed_seq_len": None,
}


def config_from_diffusers(values: dict[str, Any], where: str) -> DiTConfig:
    """Read our architecture from diffusers' config.json.

    Raises:
        ValueError: a field is missing, or describes a variant of Wan that this model does not support.
    """
    check_sizes(values, ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "patch_size"), where)
    check_sizes(values, ("in_channels", "out_channels", "text_dim", "freq_dim", "eps"), where)
    for name, only in _DIFFUSERS_FIXED.items():
        if values.get(name, only) != only:
            raise ValueError(f"{where}: {name} is {shown(values[name])}; only {only!r} can be converted")
    hidden_size = values["num_attention_heads"] * values["attention_head_dim"]
    image_dim, added = values.get("image_dim"), values.get("added_kv_proj_dim")
    if added not in ((None,) if image_dim is None else (hidden_size,)):
        raise ValueError(f"{where}: image_dim is {image_dim} and added_kv_proj_dim {added}, with a width {hidden_size}")
    return DiTConfig(
        num_layers=values["num_layers"],
        hidden_size=hidden_size,
        num_attention_heads=values["num_attention_heads"],
        ffn_hidden_size=values["ffn_dim"],
        latent_channels=values["out_channels"],
        mask_channels=_mask_channels(values["in_channels"], values["out_channels"], where),
        patch_size=tuple(values["patch_size"]),
        text_embed_dim=values["text_dim"],
        image_embed_dim=image_dim or 0,
        freq_dim=values["freq_dim"],
        layernorm_epsilon=values["eps"],
        **_FIXED,
    )


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Write our architecture as diffusers' config.json.

    Raises:
        ValueError: the architecture has a part that diffusers' transformer lacks.
    """
    _check_expressible(config, "diffusers")
    return {
        "_class_name": DIFFUSERS_CLASS,
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.latent_channels,
        "text_dim": config.text_embed_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "eps": config.layernorm_epsilon,
        "image_dim": config.image_embed_dim or None,
        "added_kv_proj_dim": config.hidden_size if config.image_embed_dim else None,
        "rope_max_seq_len": 1024,
        **_DIFFUSERS_FIXED,
    }


def config_from_wan(values: dict[str, Any], shapes: Shapes, where: str) -> DiTConfig:
    """Read our architecture from the original's config.json and the shapes of its weights.

    Raises:
        ValueError: a field is missing, or a weight whose shape gives a size.
    """
    check_sizes(values, ("num_layers", "num_heads", "dim", "ffn_dim", "in_dim", "out_dim", "freq_dim", "eps"), where)
    for name, axes in (("patch_embedding.weight", 5), ("text_embedding.0.weight", 2)):
        if len(shapes.get(name, ())) != axes:
            raise ValueError(f"{where}: {name} has the shape {shapes.get(name)}; Wan2.1's has {axes} axes")
    image = shapes.get("img_emb.proj.1.weight")
    return DiTConfig(
        num_layers=values["num_layers"],
        hidden_size=values["dim"],
        num_attention_heads=values["num_heads"],
        ffn_hidden_size=values["ffn_dim"],
        latent_channels=values["out_dim"],
        mask_channels=_mask_channels(values["in_dim"], values["out_dim"], where),
        patch_size=shapes["patch_embedding.weight"][2:],
        text_embed_dim=shapes["text_embedding.0.weight"][1],
        image_embed_dim=image[1] if image else 0,
        freq_dim=values["freq_dim"],
        layernorm_epsilon=values["eps"],
        **_FIXED,
    )


def config_to_wan(config: DiTConfig) -> dict[str, Any]:
    """Write our architecture as the original's config.json. It gets a field for the patch if that is not 1 2 2.

    Raises:
        ValueError: the architecture has a part that Wan2.1 lacks.
    """
    _check_expressible(config, "wan")
    values = {
        "_class_name": WAN_CLASS,
        "model_type": "i2v" if config.image_embed_dim else "t2v",
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
    return values if config.patch_size == _WAN_PATCH else values | {"patch_size": list(config.patch_size)}


def check_sizes(values: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Refuse a config that lacks a field, or has no number there: sizes are from 1 to 2^31.

    Raises:
        ValueError: a field is missing or out of range; the message names all such fields.
    """
    if missing := [name for name in names if values.get(name) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    kinds = {"eps": Positive, "patch_size": tuple[_SizeField, _SizeField, _SizeField]}
    optional = [name for name in ("image_dim", "added_kv_proj_dim") if values.get(name) is not None]
    for name in (*names, *optional):
        try:
            msgspec.convert(values[name], kinds.get(name, _SizeField))
        except msgspec.ValidationError:
            expected = allowed(kinds.get(name, _SizeField))
            raise ValueError(f"{where}: {name} must be {expected}, got {shown(values[name])}") from None


def _mask_channels(in_channels: int, out_channels: int, where: str) -> int:
    if in_channels <= 2 * out_channels:
        raise ValueError(
            f"{where}: {in_channels} input channels for {out_channels} latent channels; an image-to-video model has "
            f"the noise, a mask and the condition: more than {2 * out_channels}"
        )
    return in_channels - 2 * out_channels


def _check_expressible(config: DiTConfig, kind: str) -> None:
    wrong = [f"{name} {getattr(config, name)}" for name, only in _FIXED.items() if getattr(config, name) != only]
    if config.text_embed_dim == 0:
        wrong.append("text_embed_dim 0")
    if wrong:
        reason = "; the routers have no place there" if config.layer_memory else ""
        raise ValueError(f"the format {kind} cannot hold a model with {', '.join(wrong)}{reason}")
