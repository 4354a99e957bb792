"""Muon for weights that tensor parallelism cuts into slices, as one link of Megatron's optimizer chain.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) orthogonalises each matrix's momentum. The momentum of
a sliced weight is gathered over the tensor-parallel group first, so that the update is the one a single process makes;
rows may come back in another order, which orthogonalisation commutes with.
"""

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    _get_param_groups,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor, nn

from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.sequence import all_gather_each, local_slice, share_in_turn
from megatron_fsvideo.training.muon import scaled_orthogonal

ConfigOverrides = dict[ParamKey, ParamGroupOverride]


class TensorParallelMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay on 2-dimensional weights, whole or sliced over TP."""

    def __init__(
        self,
        param_groups: list[dict],
        pgs: ProcessGroups,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(param_groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.pgs = pgs
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update. Its root-mean-square does not depend on the gradient's scale, only on `lr`."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = [self._nesterov(weight, group["momentum"]) for weight in weights]
            for weight, direction in zip(weights, self._directions(weights, updates), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction.to(weight.dtype), alpha=-group["lr"])

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)

    def _directions(self, weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """The scaled orthogonal factor of each update; a slice of it where the update is a slice.

        The tensor-parallel ranks share the work: each makes every tp_size-th direction. Two collectives in all.
        """
        if self.pgs.tp_size == 1:
            return [scaled_orthogonal(update, self.dtype) for update in updates]
        group, dims = self.pgs.tp, [_sliced_dim(weight) for weight in weights]
        sliced = [k for k, dim in enumerate(dims) if dim is not None]
        wholes = list(updates)
        gathered = all_gather_each([updates[k] for k in sliced], [dims[k] for k in sliced], group)
        for k, whole in zip(sliced, gathered, strict=True):
            wholes[k] = whole
        made = [scaled_orthogonal(whole, self.dtype) for whole in wholes[self.pgs.tp_rank :: self.pgs.tp_size]]
        directions = share_in_turn(made, wholes, group)
        for k in sliced:
            directions[k] = local_slice(directions[k], dims[k], group)
        return directions


def build_muon_chain(
    config: MegatronOptimizerConfig,
    chunks: list[nn.Module],
    overrides: ConfigOverrides,
    pgs: ProcessGroups,
    *,
    muon_lr: float,
    dtype: torch.dtype,
    momentum: float = 0.95,
) -> MegatronOptimizer:
    """Muon on the matrices inside the transformer layers, Megatron's AdamW on everything else.

    Raises:
        ValueError: with the distributed optimizer, which shards flat buffers: Muon needs whole matrices.
    """
    if config.use_distributed_optimizer:
        raise ValueError("optimizer muon does not work with use_distributed_optimizer: it needs whole matrices")
    matrices = [p for chunk in chunks for name, p in chunk.named_parameters() if is_muon_matrix(name, p)]
    others = [p for chunk in chunks for name, p in chunk.named_parameters() if not is_muon_matrix(name, p)]

    groups = _groups_of(others, config, chunks, overrides)
    for group in groups:
        group["max_lr"] = muon_lr
        group["min_lr"] = config.min_lr * muon_lr / config.lr
    muon = TensorParallelMuon(groups, pgs, lr=muon_lr, weight_decay=config.weight_decay, momentum=momentum, dtype=dtype)
    wrapped = _wrap(muon, config)

    _set_trainable(matrices, False)
    adam = get_megatron_optimizer(
        config, chunks, overrides, use_gloo_process_groups=False, pg_collection=pgs.collection
    )
    _set_trainable(matrices, True)
    return ChainedOptimizer([wrapped, *adam.chained_optimizers])


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates this parameter: a linear layer's weight inside a transformer layer, no router or table."""
    return parameter.dim() == 2 and ".layers." in name and name.endswith(".weight") and "router" not in name


def _groups_of(
    frozen: list[nn.Parameter], config: MegatronOptimizerConfig, chunks: list[nn.Module], overrides: ConfigOverrides
) -> list[dict]:
    """Megatron's parameter groups of everything but `frozen` (it groups what requires a gradient)."""
    _set_trainable(frozen, False)
    groups = _get_param_groups(chunks, config, overrides)
    _set_trainable(frozen, True)
    return groups


def _wrap(muon: TensorParallelMuon, config: MegatronOptimizerConfig) -> MegatronOptimizer:
    if config.bf16:
        return Float16OptimizerWithFloat16Params(muon, config, None, _init_state)
    return FP32Optimizer(muon, config, _init_state)


def _init_state(optimizer: torch.optim.Optimizer, config: MegatronOptimizerConfig | None = None) -> None:
    """Empty momentum, which loading a checkpoint fills."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))


def _set_trainable(parameters: list[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def _sliced_dim(weight: Tensor) -> int | None:
    # Megatron's parallel linears mark their weights; a plain parameter has no mark, master copies inherit it.
    if not getattr(weight, "tensor_model_parallel", False):
        return None
    return weight.partition_dim
