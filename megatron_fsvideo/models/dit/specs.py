"""The parts of a DiT layer as a Megatron module spec."""

from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.models.backends import Backend
from megatron_fsvideo.models.dit.attention import AttentionSubmodules, CrossAttention, SelfAttention
from megatron_fsvideo.models.dit.layer import DiTLayer


def dit_layer_spec(model_config: DiTConfig, backend: Backend) -> ModuleSpec:
    """The spec of every layer; whether a layer has a router follows from its number."""
    attention = AttentionSubmodules(
        entered_linear=backend.entered_linear,
        row_parallel_linear=backend.row_parallel_linear,
        core_attention=backend.core_attention,
    )
    context = {"has_text": model_config.text_embed_dim > 0, "has_image": model_config.image_embed_dim > 0}
    return ModuleSpec(
        module=DiTLayer,
        params={"model_config": model_config},
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm,
            self_attention=ModuleSpec(module=SelfAttention, submodules=attention),
            self_attn_bda=IdentityFuncOp,
            pre_cross_attn_layernorm=backend.affine_layer_norm,
            cross_attention=ModuleSpec(module=CrossAttention, params=context, submodules=attention),
            cross_attn_bda=IdentityFuncOp,
            pre_mlp_layernorm=backend.layer_norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear
                ),
            ),
            mlp_bda=IdentityFuncOp,
        ),
    )
