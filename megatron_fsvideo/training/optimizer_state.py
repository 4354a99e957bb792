"""The optimizer's part of a checkpoint: state by weight name, so that any layout and any chain of optimizers reads it.

Megatron's own code is used for the distributed optimizer only. For the others it numbers states by their place in
parameter groups, which goes wrong where bf16 and fp32 parameters share a group, as they do here.

Parameter groups are not stored: learning rates come from the schedule, everything else from the job.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.sequence import all_gather_slices

# Any layout, and the distributed optimizer at any data-parallel size, reads what another wrote.
CHECKPOINT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
MASTER = "fp32_param"
STEP = "step"

OptimizerState = dict[str, Any]


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, weights: dict[str, ShardedTensor], is_loading: bool
) -> OptimizerState:
    """What a checkpoint holds of the optimizer.

    Args:
        weights: the model's sharded tensors, whose `data` are the parameters themselves.
        is_loading: the states will be filled.
    """
    # Nothing has been stepped yet in a run that loads, or whose every step so far was skipped.
    for link in optimizer.chained_optimizers:
        _make_empty_state(link.optimizer)
    if _is_distributed(optimizer):
        for link in optimizer.chained_optimizers:
            _replace_gathering(link)
        with megatron_on_cpu():
            return optimizer.sharded_state_dict(weights, is_loading, metadata=CHECKPOINT_METADATA)
    # Not by key: virtual stages of a rank have copies of the embedders, which share it.
    by_parameter = {id(tensor.data): (name, tensor) for name, tensor in weights.items()}
    content: OptimizerState = {"tensors": {}, STEP: None}
    for link in optimizer.chained_optimizers:
        for parameter, master in _masters(link):
            name_of_weight, weight = by_parameter[id(parameter)]
            tensors = _state_tensors(link.optimizer, parameter, master)
            content["tensors"][name_of_weight] = {
                name: make_sharded_optimizer_tensor(weight, tensor, f"optimizer.{name}")
                for name, tensor in tensors.items()
            }
            # All AdamW parameters have been stepped equally often; Muon keeps no count.
            content[STEP] = _step_of(link.optimizer, master, content[STEP])
    return content


def load_optimizer_state(
    optimizer: ChainedOptimizer, weights: dict[str, ShardedTensor], content: OptimizerState
) -> None:
    """Take in what `load_checkpoint` made of `sharded_optimizer_state(..., is_loading=True)`."""
    if _is_distributed(optimizer):
        settings = [_settings(link.optimizer) for link in optimizer.chained_optimizers]
        with megatron_on_cpu():
            optimizer.load_state_dict(content)
        for link, groups in zip(optimizer.chained_optimizers, settings, strict=True):
            # Megatron restores the groups' rates and decay too: another stage's, or those before a flag was changed.
            for group, mine in zip(link.optimizer.param_groups, groups, strict=True):
                group.update(mine)
            # Megatron gives torch's AdamW one tensor as the step of all parameters: each would advance it.
            for state in link.optimizer.state.values():
                if isinstance(link.optimizer, torch.optim.AdamW):
                    state[STEP] = state[STEP].clone()
        return
    names = {id(tensor.data): name for name, tensor in weights.items()}
    with torch.no_grad():
        for link in optimizer.chained_optimizers:
            for parameter, master in _masters(link):
                for name, tensor in _state_tensors(link.optimizer, parameter, master).items():
                    tensor.copy_(content["tensors"][names[id(parameter)]][name])
            _set_steps(link.optimizer, content[STEP])


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the job says about each parameter group."""
    return [{k: v for k, v in group.items() if k not in ("params", STEP)} for group in optimizer.param_groups]


def master_weights(optimizer: ChainedOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(model parameter, what is stepped in its place) of all parameters; not of the distributed optimizer."""
    for link in optimizer.chained_optimizers:
        yield from _masters(link)


def _is_distributed(optimizer: ChainedOptimizer) -> bool:
    return any(isinstance(link, DistributedOptimizer) for link in optimizer.chained_optimizers)


def _replace_gathering(link: DistributedOptimizer) -> None:
    """Megatron lays the gathered states out without the padding between buckets, but reads them as if with it.

    Weights and moments in all buckets but the first would be saved shifted. There are several buckets with pipeline
    stages (the embedders' copies) and with overlap_grad_reduce.
    """

    def gather(use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool) -> dict[int, dict]:
        return {
            index: {dtype: _whole_buffer(link, index, buckets, empty_data) for dtype, buckets in ranges.items()}
            for index, ranges in enumerate(link.gbuf_ranges)
        }

    link.get_parameter_state_dp_zero = gather


def _whole_buffer(
    link: DistributedOptimizer, index: int, buckets: list[dict[str, Any]], is_empty: bool
) -> dict[str, Tensor]:
    """Weights and moments of all data-parallel ranks, fp32, in the layout of the gradient buffer."""
    buffer = link.buffers[index]
    whole = {name: torch.zeros(buffer.numel) for name in ("param", "exp_avg", "exp_avg_sq")}
    if is_empty:
        return whole
    for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
        length = bucket.grad_data.numel()
        for name, target in whole.items():
            shard = torch.zeros(length // link.data_parallel_group.size(), device=bucket.grad_data.device)
            for parameter, places in ranges["param_map"].items():
                place = places["gbuf_local"]
                shard[place.start : place.end] = link._get_main_param_and_optimizer_states(parameter)[name]
            gathered = all_gather_slices(shard, 0, link.data_parallel_group)
            target[bucket.offset : bucket.offset + length] = gathered.cpu()
    return whole


def _masters(link: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(model parameter, what the optimizer steps in its place): an fp32 copy of a bf16 parameter, or itself."""
    if isinstance(link, Float16OptimizerWithFloat16Params):
        for models, masters in zip(link.float16_groups, link.fp32_from_float16_groups, strict=True):
            yield from zip(models, masters, strict=True)
        for group in link.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for parameter in link.get_parameters():
            yield parameter, parameter


def _state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, master: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[master]
    tensors = {name: value for name, value in state.items() if name != STEP}
    return tensors if master is parameter else tensors | {MASTER: master}


def _make_empty_state(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would make."""
    names = ("exp_avg", "exp_avg_sq") if _is_adam(optimizer) else ("momentum_buffer",)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in names:
                state.setdefault(name, torch.zeros_like(parameter, requires_grad=False))
            if isinstance(optimizer, torch.optim.AdamW):
                state.setdefault(STEP, torch.zeros((), dtype=torch.float32))


def _step_of(optimizer: torch.optim.Optimizer, master: Tensor, known: int | None) -> int | None:
    if not _is_adam(optimizer):
        return known
    if isinstance(optimizer, torch.optim.AdamW):
        return int(optimizer.state[master][STEP])
    # Fused implementations count per group.
    return next(int(group[STEP]) for group in optimizer.param_groups if STEP in group)


def _set_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state[STEP].fill_(step)
    elif _is_adam(optimizer):
        for group in optimizer.param_groups:
            group[STEP] = step


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return "betas" in optimizer.defaults
