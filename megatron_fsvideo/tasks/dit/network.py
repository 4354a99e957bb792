"""Builds the DiT as a network in training from the groups of a job that concern it."""

from typing import Any, Protocol

import torch

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, OptimizerConfig, TrainingConfig, to_dict
from megatron_fsvideo.models.dit import build_dit_chunks
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.training.network import TrainedNetwork


class TrainsDiT(Protocol):
    """Groups of a job from which a DiT is built and trained."""

    model: DiTConfig
    parallel: DiTParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig


def build_dit_network(job: TrainsDiT, pgs: ProcessGroups, record: dict[str, Any] | None = None) -> TrainedNetwork:
    """Build a DiT with initial weights. This needs neither data nor folders.

    Args:
        record: entries of the network's record besides the model.

    Raises:
        ValueError: the layout does not fit the model, or this machine cannot run the backend.
    """
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    chunks = build_dit_chunks(job.model, job.parallel, pgs, params_dtype=dtype, seed=job.training.seed)
    rules = dit_parameter_rules(chunks, job.optimizer.router_lr_mult)
    described = {"kind": "dit", "model": to_dict(job.model), "bf16": job.training.bf16} | (record or {})
    config = chunks[0].config
    return TrainedNetwork("dit", chunks, config, rules, job.optimizer, job.parallel, job.training, pgs, described)
