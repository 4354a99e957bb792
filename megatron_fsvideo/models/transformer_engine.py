"""megatron-core's Transformer Engine modules as a backend. Only `backends.backend_for` and recomputation import this.

Fused modules (norm and linear in one) have no place here: a modulation stands between each norm and its linear, and the
weights keep the names that they have with torch's modules.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fsvideo.config import require
from megatron_fsvideo.models.dot_product_attention import AttentionType
from megatron_fsvideo.models.norms import LayerNorm


class TEEnteredLinear(TEColumnParallelLinear):
    """Column parallel, for an input that has entered the tensor-parallel region: it exchanges nothing.

    Transformer Engine's own column-parallel linear would sum the input's gradient over the ranks a second time.
    Megatron switches its exchanges off for experts, whose tokens something else moves: this asks for that.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_group: ProcessGroup,
    ) -> None:
        assert bias and not is_expert and not config.sequence_parallel
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=gather_output,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=True,
            tp_group=tp_group,
        )
        # Transformer Engine marks the weight, and the bias only where it exchanges; megatron-core gave that a stride.
        self.bias.tensor_model_parallel, self.bias.partition_dim = True, 0


class TECoreAttention(TEDotProductAttention):
    """softmax(q k^T / sqrt(d)) v in both directions; self-attention's tokens may be cut over a context-parallel group.

    How the ranks exchange them is `--cp-comm-type`. Transformer Engine takes each rank's tokens for two pieces from the
    two ends of a causal sequence; without a mask the order of tokens means nothing to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attention_type: AttentionType,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        if attention_type == "cross":  # the context is whole on every rank
            config = copy(config)
            config.context_parallel_size = 1
        super().__init__(
            config,
            layer_number,
            AttnMaskType.no_mask,
            attention_type,
            cp_comm_type=config.cp_comm_type,
            pg_collection=pg_collection,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [s, b, n, d], key and value [l, b, n, d] -> [s, b, n * d]."""
        return super().forward(query, key, value, attention_mask=None, attn_mask_type=AttnMaskType.no_mask)


class TransformerEngineBackend:
    """Transformer Engine's linears, affine norm and attention; the norm without weights it does not have."""

    column_parallel_linear = TEColumnParallelLinear
    row_parallel_linear = TERowParallelLinear
    entered_linear = TEEnteredLinear
    layer_norm = LayerNorm
    affine_layer_norm = TENorm
    core_attention = TECoreAttention


def checkpoint_in_fp8(function: Callable, *args: Any) -> Any:
    """`function(*args)`, of whose activations none are kept: made again in FP8, with the scales of the first time."""
    return require("transformer_engine.pytorch.distributed", "gpu").checkpoint(function, *args, use_reentrant=False)
