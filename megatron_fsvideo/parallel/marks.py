"""Marks on a parameter, by which Megatron reduces and counts its gradient correctly.

| mark | meaning to Megatron |
|---|---|
| `sequence_parallel` | a replica saw only its own tokens: sum its gradient over the tensor-parallel group |
| `tensor_model_parallel` | each rank holds a slice: every slice counts in the gradient norm |
| `pipeline_parallel` | every stage has a copy: sum its gradient over the stages |
| `shared_embedding` | give it a data-parallel bucket of its own, or stages would sum different shards |
| `shared` | this copy is not the one that counts in the gradient norm |
"""

from collections.abc import Iterable

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from megatron_fsvideo.parallel.groups import ProcessGroups


def mark_sees_local_tokens(parameters: Iterable[nn.Parameter], sequence_parallel: bool) -> None:
    """Mark replicated parameters that are applied only to this rank's tokens."""
    for parameter in parameters:
        parameter.sequence_parallel = sequence_parallel


def mark_sliced(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter of which each tensor-parallel rank holds a slice along `dim`."""
    if not hasattr(parameter, "tensor_model_parallel"):  # Megatron's own linears have marked theirs already
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def mark_on_every_stage(parameters: Iterable[nn.Parameter], pgs: ProcessGroups, is_first_copy: bool) -> None:
    """Mark parameters of which every pipeline stage and virtual stage has a copy; one copy counts as the first."""
    if pgs.pp_size == 1:
        return
    for parameter in parameters:
        parameter.pipeline_parallel = True
        parameter.shared_embedding = True
        parameter.shared = not is_first_copy
