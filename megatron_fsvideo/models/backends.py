"""Which linears, norms and attention a layer is made of. A backend answers; the layer specs only ask.

`TorchBackend` runs anywhere. Transformer Engine's is in transformer_engine.py, which only `backend_for` imports: it
needs the library. Weights have the same names and shapes with both.
"""

from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fsvideo.config import DiTParallelConfig, require
from megatron_fsvideo.models.dot_product_attention import AttentionType, dot_product_attention
from megatron_fsvideo.models.norms import AffineLayerNorm, LayerNorm
from megatron_fsvideo.parallel.sequence import heads_to_tokens, tokens_to_heads

# Compute capability that a recipe's matrix products need, and the CUDA version, as Transformer Engine asks for them.
FP8_NEEDS = {
    "tensorwise": ((8, 9), (12, 1)),
    "delayed": ((8, 9), (12, 1)),
    "blockwise": ((9, 0), (12, 9)),
    "mxfp8": ((10, 0), (12, 8)),
}


class Backend(Protocol):
    """The parts of a transformer layer, for module specs.

    Attributes:
        column_parallel_linear, row_parallel_linear: the linears of Megatron's MLP.
        entered_linear: column parallel too, for an input that has entered the tensor-parallel region already
            (`parallel.sequence.enter_tensor_parallel`): it exchanges nothing, in either direction.
        layer_norm: without weights, fp32 out.
        affine_layer_norm: with gain and bias.
        core_attention: built from (config, layer_number, attention_type, pg_collection); takes queries, keys, values.
    """

    column_parallel_linear: ModuleSpec | type
    row_parallel_linear: ModuleSpec | type
    entered_linear: ModuleSpec | type
    layer_norm: ModuleSpec | type
    affine_layer_norm: ModuleSpec | type
    core_attention: ModuleSpec | type


class UlyssesAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in both directions; self-attention's tokens may be cut over a context-parallel group.

    Ulysses (Jacobs et al. 2023): an all-to-all gives each rank all tokens of some heads, a second one gives them back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attention_type: AttentionType,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        # What cross-attention attends to is whole on every rank: nothing is exchanged.
        self.cp_group = pg_collection.cp if attention_type == "self" and pg_collection.cp.size() > 1 else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [s, b, n, d], key and value [l, b, n, d] -> [s, b, n * d]; with context parallelism s = l."""
        if self.cp_group is None:
            return dot_product_attention(query, key, value).flatten(2)
        batch = query.shape[1]
        together = tokens_to_heads(torch.cat([query, key, value], dim=1), self.cp_group)
        attended = dot_product_attention(*together.split(batch, dim=1))
        return heads_to_tokens(attended, self.cp_group).flatten(2)


class TorchBackend:
    """Megatron's own parallel linears, torch's norms and attention."""

    column_parallel_linear = ColumnParallelLinear
    row_parallel_linear = RowParallelLinear
    entered_linear = ModuleSpec(module=ColumnParallelLinear, params={"disable_grad_reduce": True})
    layer_norm = LayerNorm
    affine_layer_norm = AffineLayerNorm
    core_attention = UlyssesAttention


def backend_for(parallel: DiTParallelConfig) -> Backend:
    """The backend behind `--transformer-impl`.

    Raises:
        ValueError, ImportError: see `check_backend`.
    """
    check_backend(parallel)
    if parallel.transformer_impl == "local":
        return TorchBackend
    from megatron_fsvideo.models.transformer_engine import TransformerEngineBackend

    return TransformerEngineBackend


def check_backend(parallel: DiTParallelConfig) -> None:
    """Refuse what this machine cannot run; entry scripts ask before they build anything.

    Raises:
        ValueError: no CUDA device, or one that is too old for the FP8 recipe.
        ImportError: Transformer Engine is not installed.
    """
    if parallel.transformer_impl == "local":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "transformer_impl transformer_engine needs a CUDA device, and there is none here; use --transformer-impl "
            "local without FP8"
        )
    require("transformer_engine.pytorch", "gpu")
    if parallel.fp8_format is not None:
        _check_fp8(parallel.fp8_recipe, torch.cuda.get_device_capability(), torch.version.cuda)


def _check_fp8(recipe: str, capability: tuple[int, int], cuda_version: str) -> None:
    needed, needed_cuda = FP8_NEEDS[recipe]
    if capability < needed:
        raise ValueError(
            f"fp8_recipe {recipe} needs compute capability {_dotted(needed)}, and this device has "
            f"{_dotted(capability)}; {_recipes_for(capability)}"
        )
    if tuple(int(part) for part in cuda_version.split(".")[:2]) < needed_cuda:
        raise ValueError(
            f"fp8_recipe {recipe} needs CUDA {_dotted(needed_cuda)}, and torch was built for {cuda_version}"
        )


def _recipes_for(capability: tuple[int, int]) -> str:
    possible = [recipe for recipe, (needed, _) in FP8_NEEDS.items() if capability >= needed]
    return f"it can do {', '.join(possible)}" if possible else "leave --fp8-format out"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
