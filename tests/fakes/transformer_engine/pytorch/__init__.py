"""The modules that megatron-core 0.16.1 wraps."""

from transformer_engine.pytorch import distributed, ops
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.linear import Linear
from transformer_engine.pytorch.norm import LayerNorm
from transformer_engine.pytorch.unused import GroupedLinear, LayerNormLinear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
]
