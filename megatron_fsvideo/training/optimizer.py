"""Megatron's data parallelism, optimizer and learning-rate schedule, set up for the DiT."""

import math

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_fsvideo.config import DiTParallelConfig, OptimizerConfig, TrainingConfig
from megatron_fsvideo.models.dit import DiTModel
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.training.tensor_parallel_muon import (
    ConfigOverrides,
    build_muon_chain,
)


def wrap_ddp(model: DiTModel, parallel: DiTParallelConfig, pgs: ProcessGroups) -> DistributedDataParallel:
    """Megatron's DDP: gradients are summed in fp32 over the data- and context-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with megatron_on_cpu():
        wrapped = DistributedDataParallel(model.config, ddp_config, model, pg_collection=pgs.collection)
    # The schedule finds these on the model's config.
    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync if parallel.overlap_grad_reduce else None
    return wrapped


def wrap_ddp_chunks(
    chunks: list[DiTModel], parallel: DiTParallelConfig, pgs: ProcessGroups
) -> list[DistributedDataParallel]:
    """The same for the virtual stages of a rank, which share one configuration."""
    wrapped = [wrap_ddp(chunk, parallel, pgs) for chunk in chunks]
    if parallel.overlap_grad_reduce and len(wrapped) > 1:
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    return wrapped


def build_optimizer(
    wrapped: DistributedDataParallel | list[DistributedDataParallel],
    optimizer: OptimizerConfig,
    parallel: DiTParallelConfig,
    training: TrainingConfig,
    pgs: ProcessGroups,
) -> MegatronOptimizer:
    """AdamW on everything, or Muon on the layers' matrices and AdamW on the rest.

    Args:
        wrapped: the model, or this rank's model chunks.
    """
    chunks = wrapped if isinstance(wrapped, list) else [wrapped]
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    overrides = parameter_overrides(optimizer)
    with megatron_on_cpu():
        if optimizer.optimizer == "muon":
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[optimizer.muon_precision]
            return build_muon_chain(config, chunks, overrides, pgs, muon_lr=optimizer.muon_lr, dtype=dtype)
        return get_megatron_optimizer(
            config, chunks, overrides, use_gloo_process_groups=False, pg_collection=pgs.collection
        )


def step_if_finite(optimizer: ChainedOptimizer, loss: float, pgs: ProcessGroups) -> tuple[float, bool]:
    """Clip and step as Megatron does, but leave everything alone if the loss or the gradient norm is not finite.

    Megatron's own `step` scales by the norm unseen: one such batch would turn all weights into NaN.

    Returns:
        The gradient norm before clipping, and whether the step was done: all ranks do the same.
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


def parameter_overrides(optimizer: OptimizerConfig) -> ConfigOverrides:
    """No weight decay on biases, norms, modulation and routers; routers learn faster (dit_spec 2.2, B5)."""
    undecayed = ParamWithNamePredicate(name="undecayed", fn=lambda parameter, name: is_undecayed(name, parameter))
    router = ParamWithNamePredicate(name="router", fn=lambda parameter, name: ".router." in name)
    overrides: ConfigOverrides = {ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0}}
    multiplier = optimizer.router_lr_mult
    if multiplier != 1.0:
        overrides[ParamKey(with_name_predicate=router)] = {
            "max_lr": multiplier * optimizer.lr,
            "min_lr": multiplier * optimizer.min_lr,
            # Not applied to the rate: the distributed optimizer's checkpoint tells groups apart by their multipliers.
            "lr_mult": multiplier,
        }
    return overrides


def is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay leaves this parameter alone."""
    return parameter.dim() == 1 or name.endswith("scale_shift_table") or ".router." in name


class LateDecayScheduler(OptimizerParamScheduler):
    """Warm-up, a constant part until `lr_decay_start`, then the decay. It counts in samples, as Megatron's does."""

    def __init__(
        self, megatron_optimizer: MegatronOptimizer, optimizer: OptimizerConfig, training: TrainingConfig
    ) -> None:
        batch, iterations = training.global_batch_size, training.train_iters
        warmup = min(optimizer.lr_warmup_iters, iterations - 1)
        self._batch = batch
        self.decay_start = max(optimizer.lr_decay_start * iterations, warmup) * batch
        super().__init__(
            megatron_optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=warmup * batch,
            lr_decay_steps=iterations * batch,
            lr_decay_style=optimizer.lr_decay_style,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def go_to(self, iteration: int) -> None:
        """Set every group's learning rate for the step after `iteration`, whatever batches the steps before had."""
        self.num_steps = 0
        self.step(increment=iteration * self._batch)

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of a group at the current number of samples."""
        if self.lr_warmup_steps < self.num_steps <= self.decay_start:
            return param_group["max_lr"]
        if self.num_steps <= self.lr_warmup_steps:
            return super().get_lr(param_group)
        progress = (self.num_steps - self.decay_start) / (self.lr_decay_steps - self.decay_start)
        return decayed_lr(self.lr_decay_style, progress, param_group["max_lr"], param_group["min_lr"])


def decayed_lr(style: str, progress: float, max_lr: float, min_lr: float) -> float:
    """Learning rate at `progress` in [0, 1] of the decay.

    Raises:
        ValueError: an unknown style.
    """

    progress = min(max(progress, 0.0), 1.0)
    shares = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    if style not in shares:
        raise ValueError(f"lr_decay_style is one of {', '.join(shares)}, got {style!r}")
    return min_lr + shares[style] * (max_lr - min_lr)
