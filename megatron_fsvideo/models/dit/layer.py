"""One layer of the DiT: modulated self-attention with layer memory, cross-attention, modulated feed-forward.

    a = LN(x) (1 + scale1) + shift1          m = memory mixed from earlier states, normed and modulated the same way
    x = x + gate1 * SelfAttention(q: a, k and v: m)
    x = x + CrossAttention(LN(x), text, image)
    x = x + gate2 * FFN(LN(x) (1 + scale2) + shift2)

This is Wan2.1's block (wan/modules/model.py, `WanAttentionBlock`) with the paper's layer memory (section 2.3).
Modulation is in fp32.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.models.dit.embeddings import NUM_MODULATIONS, Conditioning
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.models.dit.memory_bank import MemoryBank
from megatron_fsvideo.models.dit.recompute import run_part
from megatron_fsvideo.models.dit.rope import Rotary
from megatron_fsvideo.parallel.marks import mark_sees_local_tokens


class DiTLayer(TransformerLayer):
    """A Megatron transformer layer whose forward takes what a DiT layer needs, under its own names."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        model_config: DiTConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection=pg_collection, vp_stage=vp_stage)
        self.model_config = model_config
        self.scale_shift_table = nn.Parameter(torch.zeros(NUM_MODULATIONS, config.hidden_size))
        self.layer_memory = None
        if model_config.layer_memory and self.layer_number > 1:
            self.layer_memory = LayerMemory(self.layer_number, config.hidden_size)
            mark_sees_local_tokens(self.layer_memory.parameters(), config.sequence_parallel)
        mark_sees_local_tokens([self.scale_shift_table], config.sequence_parallel)

    def forward(
        self, hidden_states: Tensor, bank: MemoryBank | None, conditioning: Conditioning, rotary: Rotary
    ) -> Tensor:
        """X_l [s, b, h] from X_{l-1} [s, b, h] and, with layer memory, the bank of X_0 .. X_{l-1}."""
        modulation = self.scale_shift_table + conditioning.modulation  # (b, 6, h)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=1)

        query_source = modulate(self.input_layernorm(hidden_states), shift1, scale1).to(hidden_states.dtype)
        key_value_source = query_source
        if self.layer_memory is not None:
            key_value_source = self.layer_memory(query_source, hidden_states, bank, shift1, scale1)
        attended = self.self_attention(query_source, key_value_source, rotary)
        hidden_states = gated_residual(hidden_states, attended, gate1)

        attended = self.cross_attention(
            self.pre_cross_attn_layernorm(hidden_states), conditioning.text, conditioning.image
        )
        hidden_states = hidden_states + attended

        mlp_input = modulate(self.pre_mlp_layernorm(hidden_states), shift2, scale2).to(hidden_states.dtype)
        transformed, bias = run_part(self.config, "mlp", self.mlp, mlp_input)
        return gated_residual(hidden_states, transformed + bias, gate2)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed [s, b, h] scaled and shifted per sample by [b, h]."""
    return normed * (1 + scale) + shift


def gated_residual(hidden_states: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """hidden_states [s, b, h] plus a branch gated per sample by [b, h]; the sum in fp32."""
    return (hidden_states.float() + branch.float() * gate).to(hidden_states.dtype)
