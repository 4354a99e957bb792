"""Layer norms of transformer layers, computed in fp32."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fsvideo.parallel.marks import mark_sees_local_tokens


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
