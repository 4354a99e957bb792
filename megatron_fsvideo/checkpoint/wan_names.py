"""Parameter names of diffusers' WanTransformer3DModel and ours, one to one (dit_spec 1.3).

Linears are separate in both; our patch embedding is the linear layer that theirs spells as a convolution, and the
head's outputs come in another order within a patch. Beware: their norm2 is the affine norm before cross-attention.
"""

import re

from torch import Tensor

# Ours -> diffusers', as prefixes of whole names outside the layers.
_TOP = {
    "patch_embedding.": "patch_embedding.",
    "condition_embedder.time_embedder.": "condition_embedder.time_embedder.",
    "condition_embedder.time_proj.": "condition_embedder.time_proj.",
    "condition_embedder.text_embedder.": "condition_embedder.text_embedder.",
    "condition_embedder.image_embedder.linear_1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "condition_embedder.image_embedder.linear_2.": "condition_embedder.image_embedder.ff.net.2.",
    "condition_embedder.image_embedder.": "condition_embedder.image_embedder.",
    "head.scale_shift_table": "scale_shift_table",
    "head.proj_out.": "proj_out.",
}

# Ours -> diffusers', inside a layer.
_LAYER = {
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
}

_LAYER_NAME = re.compile(r"block\.layers\.(\d+)\.(.+)")


def to_diffusers_name(name: str) -> str:
    """diffusers' name of one of our parameters (names of the whole model).

    Raises:
        KeyError: the parameter has no counterpart, as the layer-memory router.
    """
    if match := _LAYER_NAME.fullmatch(name):
        return f"blocks.{match[1]}.{_renamed(match[2], _LAYER)}"
    return _renamed(name, _TOP)


def from_diffusers(name: str, state: dict[str, Tensor], patch_volume: int) -> Tensor:
    """Our parameter's value out of a diffusers state dict, in our shape and order."""
    value = state[to_diffusers_name(name)]
    if name.startswith("head.proj_out."):
        # Within a patch, channels run fastest in their output and slowest in ours (as in both inputs).
        return value.unflatten(0, (patch_volume, -1)).transpose(0, 1).flatten(0, 1)
    if name == "patch_embedding.weight":
        return value.flatten(1)  # convolution with stride = kernel: a linear map of the patch
    if name.endswith("scale_shift_table"):
        return value.squeeze(0)
    return value


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(f"{name} has no counterpart in diffusers' Wan transformer")
