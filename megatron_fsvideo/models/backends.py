"""Which linears, norms and attention a layer is made of. A backend answers; the layer specs only ask.

`TorchBackend` runs anywhere. Transformer Engine's backend takes its place in `backend_for`; its library is imported
there and nowhere else.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.parallel.marks import mark_sees_local_tokens
from megatron_fsvideo.parallel.sequence import heads_to_tokens, tokens_to_heads


class Backend(Protocol):
    """The parts of a transformer layer, as classes for module specs."""

    column_parallel_linear: type
    row_parallel_linear: type
    layer_norm: type
    affine_layer_norm: type
    core_attention: type


class LayerNorm(nn.Module):
    """Layer norm without weights, in fp32; what modulation follows. [..., h] -> fp32 [..., h]"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=self.eps)


class AffineLayerNorm(nn.Module):
    """Layer norm with gain and bias, computed in fp32. [..., h] -> [..., h] in the input's dtype"""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        mark_sees_local_tokens(self.parameters(), config.sequence_parallel)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.layer_norm(
            hidden_states.float(), hidden_states.shape[-1:], self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden_states.dtype)


class UlyssesAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in both directions; tokens may be cut over a context-parallel group.

    Ulysses (Jacobs et al. 2023): an all-to-all gives each rank all tokens of some heads, a second one gives them back.
    """

    def __init__(self, cp_group: ProcessGroup) -> None:
        super().__init__()
        self.cp_group = cp_group

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [s, b, n, d], key and value [l, b, n, d] -> [s, b, n * d]; with context parallelism s = l."""
        if self.cp_group.size() > 1:
            batch = query.shape[1]
            together = tokens_to_heads(torch.cat([query, key, value], dim=1), self.cp_group)
            query, key, value = together.split(batch, dim=1)
        attended = scaled_dot_product_attention(query, key, value)
        return heads_to_tokens(attended, self.cp_group).flatten(2)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention in Megatron's layout: [s, b, n, d], [l, b, n, d] twice -> [s, b, n, d]."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3)


class TorchBackend:
    """Megatron's own parallel linears, torch's norms and attention."""

    column_parallel_linear = ColumnParallelLinear
    row_parallel_linear = RowParallelLinear
    layer_norm = LayerNorm
    affine_layer_norm = AffineLayerNorm
    core_attention = UlyssesAttention


def backend_for(transformer_impl: str) -> Backend:
    """The backend behind `--transformer-impl`.

    Raises:
        ValueError: Transformer Engine's, which is not built yet, or an unknown name.
    """
    if transformer_impl == "local":
        return TorchBackend
    if transformer_impl == "transformer_engine":
        raise ValueError("--transformer-impl transformer_engine is not built yet; use --transformer-impl local")
    raise ValueError(f"transformer_impl is local or transformer_engine, got {transformer_impl!r}")
