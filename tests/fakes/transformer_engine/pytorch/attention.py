"""Attention, alone or over the ranks of a context-parallel group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.base import Module


class DotProductAttention(Module):
    """softmax(q k^T / sqrt(d)) v without a mask. However ranks exchange their tokens, each query meets all keys."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and qkv_format == "sbhd" and attn_mask_type == "no_mask"
        assert window_size is None and softmax_scale is None and softmax_type == "vanilla"
        self.num_heads = num_attention_heads // (tp_group.size() if tp_group is not None else tp_size)
        self.kv_channels = kv_channels
        self.attention_type = attention_type
        self.cp_comm_type = cp_comm_type
        self.cp_groups = [] if cp_group is None else cp_group if isinstance(cp_group, list) else [cp_group]
        assert (cp_comm_type == "a2a+p2p") == (len(self.cp_groups) == 2) or not self.cp_groups

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
    ) -> Tensor:
        """[s, b, n, d], [l, b, n, d] twice -> [s, b, n * d]"""
        assert attn_mask_type == "no_mask" and attention_mask is None and core_attention_bias is None
        assert query_layer.shape[2:] == (self.num_heads, self.kv_channels)
        if self.attention_type == "self":
            assert query_layer.shape == key_layer.shape
        key, value = (self._of_all_ranks(tensor) for tensor in (key_layer, value_layer))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_layer, key, value))
        return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)

    def _of_all_ranks(self, tensor: Tensor) -> Tensor:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        for group in self.cp_groups:
            if group.size() > 1:
                assert len(tensor) % 2 == 0, "Sequence length per GPU needs to be divisible by 2!"
                if group is self.cp_groups[0] and self.cp_comm_type.startswith("a2a"):
                    assert self.num_heads % group.size() == 0
                tensor = gather_from_sequence_parallel_region(tensor, group=group)
        return torch.clone(tensor)
