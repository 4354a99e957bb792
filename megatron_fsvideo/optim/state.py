"""The optimizer's part of a checkpoint, keyed by weight name: any layout and any chain of optimizers can read it.

Megatron's own code numbers states by their place in parameter groups, which goes wrong where bf16 and fp32 parameters
share a group, and gathers the distributed optimizer's shards in one process. Here each rank writes its own part.

Parameter groups are not stored: learning rates come from the schedule, everything else from the job.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_fsvideo.optim.held import Held, fill, held_by_this_rank
from megatron_fsvideo.optim.muon import MOMENTUM_BUFFER
from megatron_fsvideo.parallel.groups import gather_objects

# As Megatron's own checkpoints name the fp32 copy of a bf16 weight.
MASTER = "fp32_param"
STEP = "step"

OptimizerState = dict[str, Any]


def sharded_weights(chunks: nn.ModuleList | list[nn.Module]) -> dict[str, ShardedTensor]:
    """This rank's weights by their names in `chunks`, as `<index of the chunk>.<name>`; keys are the network's names.

    Megatron's modules know how they are sliced; a plain module is whole on every rank. `_extra_state` is left out:
    pickles that hold nothing.
    """
    return {
        f"{index}.{name}": tensor
        for index, chunk in enumerate(chunks)
        for name, tensor in sharded_state_dict_default(chunk).items()
        if isinstance(tensor, ShardedTensor)
    }


def weight_names(weights: dict[str, ShardedTensor]) -> dict[nn.Parameter, str]:
    """Map each parameter to its name in `weights`."""
    # Keys do not identify a parameter: virtual stages of a rank have copies of the embedders under the same key.
    return {tensor.data: name for name, tensor in weights.items()}


def sharded_optimizer_state(optimizer: ChainedOptimizer, weights: dict[str, ShardedTensor]) -> OptimizerState:
    """Optimizer state for a checkpoint, under the keys `optimizer.<kind>.<weight>`; every rank calls this.

    Args:
        weights: result of `sharded_weights`; the `data` of each is the parameter itself.
    """
    names = weight_names(weights)
    tensors: dict[str, dict[str, dict[str, ShardedTensor]]] = {}
    steps = [0]
    for held in held_by_this_rank(optimizer):
        # The state is empty in a run that loads, or in which every step so far was skipped.
        _make_empty_state(held)
        weight = weights[names[held.parameter]]
        tensors[names[held.parameter]] = {
            kind: held.sharded(weight, tensor, f"optimizer.{kind}.{weight.key}")
            for kind, tensor in _state_tensors(held)
        }
        steps.append(_steps_of(held))
    # All AdamW parameters have the same step count, and Muon keeps none. A rank may hold no AdamW parameter.
    return {"tensors": tensors, STEP: max(gather_objects(max(steps)))}


@torch.no_grad()
def load_optimizer_state(
    optimizer: ChainedOptimizer, weights: dict[str, ShardedTensor], content: OptimizerState
) -> None:
    """Load the state that a checkpoint has for `sharded_optimizer_state`."""
    names = weight_names(weights)
    for held in held_by_this_rank(optimizer):
        _make_empty_state(held)
        saved = content["tensors"].get(names[held.parameter], {})
        for kind, tensor in _state_tensors(held):
            fill(tensor, saved[kind])
        _set_steps(held, content[STEP])


def _state_tensors(held: Held) -> Iterator[tuple[str, Tensor]]:
    state = held.optimizer.state[held.master]
    yield from ((kind, state[kind]) for kind in _kinds(held.optimizer))
    if held.parameter.dtype != held.master.dtype:
        yield MASTER, held.master


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq") if _is_adam(optimizer) else (MOMENTUM_BUFFER,)


def _make_empty_state(held: Held) -> None:
    """Create the state that an optimizer's first step would create."""
    state = held.optimizer.state[held.master]
    for kind in _kinds(held.optimizer):
        state.setdefault(kind, torch.zeros_like(held.master, requires_grad=False))
    if isinstance(held.optimizer, torch.optim.AdamW):
        state.setdefault(STEP, torch.zeros((), dtype=torch.float32))


def _steps_of(held: Held) -> int:
    if isinstance(held.optimizer, torch.optim.AdamW):
        return int(held.optimizer.state[held.master][STEP])
    # Fused implementations count steps per group, from their first step on, except in empty groups.
    return max(int(group.get(STEP, 0)) for group in held.optimizer.param_groups)


def _set_steps(held: Held, step: int) -> None:
    if isinstance(held.optimizer, torch.optim.AdamW):
        held.optimizer.state[held.master][STEP].fill_(step)
    elif _is_adam(held.optimizer):
        for group in held.optimizer.param_groups:
            group[STEP] = step


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return "betas" in optimizer.defaults
