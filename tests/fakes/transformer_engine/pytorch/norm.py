"""Layer norm with gain and bias."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.base import Module


class LayerNorm(Module):
    """Computed in fp32; out in the input's type."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert set(kwargs) <= {"device"} and not zero_centered_gamma
        size = hidden_size if normalized_shape is None else normalized_shape
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=params_dtype, **kwargs))
        self.bias = nn.Parameter(torch.zeros(size, dtype=params_dtype, **kwargs))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = self.bias.sequence_parallel = sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., h] -> [..., h]"""
        normed = F.layer_norm(
            hidden_states.float(), hidden_states.shape[-1:], self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden_states.dtype)
