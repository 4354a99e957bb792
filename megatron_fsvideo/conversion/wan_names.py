"""Maps the parameter names of other implementations of Wan2.1's transformer to ours, one to one.

Two spellings: diffusers' WanTransformer3DModel and the original Wan2.1. Linears are separate in all three; our patch
embedding is the linear layer that theirs spells as a convolution, their modulation tables have a leading axis of one,
and the head's outputs come in another order within a patch. Beware: diffusers' norm2 is Wan's norm3, the affine norm
before cross-attention.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from megatron_fsvideo.config import DiTConfig


@dataclass(frozen=True)
class Spelling:
    """Our prefixes of names -> those of another implementation, outside the layers and inside a layer."""

    owner: str
    top: dict[str, str]
    layer: dict[str, str]


DIFFUSERS = Spelling(
    owner="diffusers' Wan transformer",
    top={
        "patch_embedding.": "patch_embedding.",
        "condition_embedder.time_embedder.": "condition_embedder.time_embedder.",
        "condition_embedder.time_proj.": "condition_embedder.time_proj.",
        "condition_embedder.text_embedder.": "condition_embedder.text_embedder.",
        "condition_embedder.image_embedder.linear_1.": "condition_embedder.image_embedder.ff.net.0.proj.",
        "condition_embedder.image_embedder.linear_2.": "condition_embedder.image_embedder.ff.net.2.",
        "condition_embedder.image_embedder.": "condition_embedder.image_embedder.",
        "head.scale_shift_table": "scale_shift_table",
        "head.proj_out.": "proj_out.",
    },
    layer={
        "scale_shift_table": "scale_shift_table",
        "self_attention.linear_q.": "attn1.to_q.",
        "self_attention.linear_k.": "attn1.to_k.",
        "self_attention.linear_v.": "attn1.to_v.",
        "self_attention.norm_q.": "attn1.norm_q.",
        "self_attention.norm_k.": "attn1.norm_k.",
        "self_attention.linear_proj.": "attn1.to_out.0.",
        "pre_cross_attn_layernorm.": "norm2.",
        "cross_attention.linear_q.": "attn2.to_q.",
        "cross_attention.norm_q.": "attn2.norm_q.",
        "cross_attention.text.linear_k.": "attn2.to_k.",
        "cross_attention.text.linear_v.": "attn2.to_v.",
        "cross_attention.text.norm_k.": "attn2.norm_k.",
        "cross_attention.image.linear_k.": "attn2.add_k_proj.",
        "cross_attention.image.linear_v.": "attn2.add_v_proj.",
        "cross_attention.image.norm_k.": "attn2.norm_added_k.",
        "cross_attention.linear_proj.": "attn2.to_out.0.",
        "mlp.linear_fc1.": "ffn.net.0.proj.",
        "mlp.linear_fc2.": "ffn.net.2.",
    },
)

WAN = Spelling(
    owner="the original Wan2.1",
    top={
        "patch_embedding.": "patch_embedding.",
        "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
        "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
        "condition_embedder.time_proj.": "time_projection.1.",
        "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
        "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
        "condition_embedder.image_embedder.norm1.": "img_emb.proj.0.",
        "condition_embedder.image_embedder.linear_1.": "img_emb.proj.1.",
        "condition_embedder.image_embedder.linear_2.": "img_emb.proj.3.",
        "condition_embedder.image_embedder.norm2.": "img_emb.proj.4.",
        "head.scale_shift_table": "head.modulation",
        "head.proj_out.": "head.head.",
    },
    layer={
        "scale_shift_table": "modulation",
        "self_attention.linear_q.": "self_attn.q.",
        "self_attention.linear_k.": "self_attn.k.",
        "self_attention.linear_v.": "self_attn.v.",
        "self_attention.norm_q.": "self_attn.norm_q.",
        "self_attention.norm_k.": "self_attn.norm_k.",
        "self_attention.linear_proj.": "self_attn.o.",
        "pre_cross_attn_layernorm.": "norm3.",
        "cross_attention.linear_q.": "cross_attn.q.",
        "cross_attention.norm_q.": "cross_attn.norm_q.",
        "cross_attention.text.linear_k.": "cross_attn.k.",
        "cross_attention.text.linear_v.": "cross_attn.v.",
        "cross_attention.text.norm_k.": "cross_attn.norm_k.",
        "cross_attention.image.linear_k.": "cross_attn.k_img.",
        "cross_attention.image.linear_v.": "cross_attn.v_img.",
        "cross_attention.image.norm_k.": "cross_attn.norm_k_img.",
        "cross_attention.linear_proj.": "cross_attn.o.",
        "mlp.linear_fc1.": "ffn.0.",
        "mlp.linear_fc2.": "ffn.2.",
    },
)

_LAYER_NAME = re.compile(r"block\.layers\.(\d+)\.(.+)")


def their_name(name: str, spelling: Spelling) -> str:
    """The other implementation's name of one of our parameters (names of the whole model).

    Raises:
        KeyError: the parameter has no counterpart, as the layer-memory router.
    """
    match = _LAYER_NAME.fullmatch(name)
    rest, table = (match[2], spelling.layer) if match else (name, spelling.top)
    for ours, theirs in table.items():
        if rest.startswith(ours):
            return (f"blocks.{match[1]}." if match else "") + theirs + rest.removeprefix(ours)
    raise KeyError(f"{name} has no counterpart in {spelling.owner}")


def our_value(name: str, value: Tensor, patch_volume: int) -> Tensor:
    """Convert a parameter of either spelling to our shape and order. `name` is our name of the parameter."""
    if name.startswith("head.proj_out."):
        # Within a patch, channels vary fastest in their output, and slowest in our output and in both inputs.
        return value.unflatten(0, (patch_volume, -1)).transpose(0, 1).flatten(0, 1)
    if name == "patch_embedding.weight":
        return value.flatten(1)  # a convolution whose stride equals its kernel is a linear map of the patch
    if name.endswith("scale_shift_table"):
        return value.squeeze(0)
    return value


def their_value(name: str, value: Tensor, config: DiTConfig) -> Tensor:
    """Convert our parameter to the shape and order of the other spelling; undoes `our_value`."""
    if name.startswith("head.proj_out."):
        return value.unflatten(0, (-1, config.patch_volume)).transpose(0, 1).flatten(0, 1)
    if name == "patch_embedding.weight":
        return value.unflatten(1, (config.in_channels, *config.patch_size))
    if name.endswith("scale_shift_table"):
        return value.unsqueeze(0)
    return value


def to_diffusers_name(name: str) -> str:
    """Return diffusers' name of one of our parameters.

    Raises:
        KeyError: the parameter has no counterpart.
    """
    return their_name(name, DIFFUSERS)


def from_diffusers(name: str, state: dict[str, Tensor], patch_volume: int) -> Tensor:
    """Read one of our parameters from a diffusers state dict, in our shape and order."""
    return our_value(name, state[to_diffusers_name(name)], patch_volume)
