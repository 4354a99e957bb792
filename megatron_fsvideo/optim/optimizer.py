"""Sets up Megatron's data parallelism and optimizers for any network, of Megatron's modules or of plain ones."""

import math
from copy import copy

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, _get_megatron_optimizer_based_on_param_groups
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_fsvideo.config import OptimizerConfig, ParallelConfig
from megatron_fsvideo.models.parameter_rules import ParameterRules
from megatron_fsvideo.optim.matrix_exchange import MatrixExchange
from megatron_fsvideo.optim.muon import build_muon
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups

MUON_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def wrap_ddp(
    chunks: list[nn.Module], config: TransformerConfig, parallel: ParallelConfig, pgs: ProcessGroups
) -> list[DistributedDataParallel]:
    """Wrap a network in Megatron's DDP, which reduces gradients in fp32 over data- and context-parallel ranks.

    Args:
        chunks: this rank's part of a network: one module, or with virtual pipeline stages several.
        config: Megatron's settings, of this network alone: its schedule's functions are kept in them.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with megatron_on_cpu():
        wrapped = [
            DistributedDataParallel(config, copy(ddp_config), chunk, pg_collection=pgs.collection) for chunk in chunks
        ]
    # Megatron's schedule reads these functions from the configuration.
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = None
    if parallel.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def build_optimizer(
    wrapped: list[DistributedDataParallel], optimizer: OptimizerConfig, rules: ParameterRules, pgs: ProcessGroups
) -> ChainedOptimizer:
    """Build AdamW for all parameters that require a gradient, or Muon for the matrices and AdamW for the others.

    Args:
        wrapped: this rank's chunks; they decide whether the optimizer's state is shared out, and bf16 weights get fp32
            masters.
        rules: rule of every parameter of the chunks.
    """
    trained = [parameter for chunk in wrapped for parameter in chunk.module.parameters() if parameter.requires_grad]
    has_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    is_shared = wrapped[0].ddp_config.use_distributed_optimizer
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=has_bf16,
        params_dtype=torch.bfloat16 if has_bf16 else torch.float32,
        use_distributed_optimizer=is_shared,
    )
    has_muon = optimizer.optimizer == "muon"
    matrices = [parameter for parameter in trained if has_muon and rules[parameter].takes_muon]
    taken = set(matrices)
    others = [parameter for parameter in trained if parameter not in taken]
    links = []
    with megatron_on_cpu():
        if matrices:  # a small network may have no such parameters
            groups = parameter_groups(matrices, rules, optimizer, optimizer.muon_lr)
            exchange = MatrixExchange(wrapped, matrices, pgs.dp_cp) if is_shared else None
            links.append(build_muon(config, groups, pgs, MUON_DTYPES[optimizer.muon_precision], exchange))
        groups = parameter_groups(others, rules, optimizer, optimizer.lr)
        links.append(_build_adam(config, wrapped, groups, taken, pgs))
    return ChainedOptimizer(links)


def parameter_groups(
    parameters: list[nn.Parameter], rules: ParameterRules, optimizer: OptimizerConfig, max_lr: float
) -> list[dict]:
    """Group parameters by rule. The schedule moves each group's rate between its `max_lr` and `min_lr`."""
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        rule = rules[parameter]
        by_kind.setdefault((rule.decays, rule.lr_mult), []).append(parameter)
    floor = optimizer.min_lr / optimizer.lr
    return [
        {
            "params": by_kind[decays, lr_mult],
            "max_lr": lr_mult * max_lr,
            "min_lr": lr_mult * floor * max_lr,
            "lr": lr_mult * max_lr,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
        }
        for decays, lr_mult in sorted(by_kind, reverse=True)
    ]


def step_if_finite(optimizer: ChainedOptimizer, loss: float, pgs: ProcessGroups) -> tuple[float, bool]:
    """Clip and step as Megatron does, but leave everything alone if the loss or the gradient norm is not finite.

    Megatron's own `step` clips by the norm without checking that it is finite: one such batch would turn all weights
    into NaN.

    Returns:
        The gradient norm before clipping, and whether the step was done. All ranks return the same values.
    """
    with megatron_on_cpu():
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        (is_wrong,) = pgs.any_rank([not math.isfinite(loss + grad_norm)])
        if is_wrong:
            return grad_norm, False
        for link in optimizer.chained_optimizers:
            parameters = link.get_parameters()
            if parameters and link.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=link.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
    return grad_norm, True


def reload_masters(optimizer: ChainedOptimizer) -> None:
    """Take the fp32 masters of bf16 weights from the weights, which have just been overwritten."""
    with megatron_on_cpu():
        optimizer.reload_model_params()


def forget_moments(optimizer: ChainedOptimizer) -> None:
    """Start the optimizer anew from the present weights."""
    reload_masters(optimizer)
    for link in optimizer.chained_optimizers:
        link.optimizer.state.clear()
        for group in link.optimizer.param_groups:
            group.pop("step", None)  # fused implementations count steps in the group


def _build_adam(
    config: MegatronOptimizerConfig,
    wrapped: list[DistributedDataParallel],
    groups: list[dict],
    taken: set[nn.Parameter],
    pgs: ProcessGroups,
) -> MegatronOptimizer:
    """Build Megatron's AdamW or its distributed optimizer, without the parameters of another link of the chain."""
    buffers = {}
    for index, chunk in enumerate(wrapped):
        buffers[index] = [copy(buffer) for buffer in chunk.buffers]
        for buffer in buffers[index]:
            buffer.param_index_map = {p: place for p, place in buffer.param_index_map.items() if p not in taken}
    return _get_megatron_optimizer_based_on_param_groups(
        config,
        wrapped,
        groups,
        per_model_buffers=buffers,
        model_parallel_group=pgs.collection.mp,
        data_parallel_group=pgs.dp_cp,
        data_parallel_group_idx=pgs.collection.mp.rank(),
        intra_dist_opt_group=pgs.collection.intra_dist_opt,
        pg_collection=pgs.collection,
    )
