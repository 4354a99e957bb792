"""Everything a checkpoint needs to generate: the DiT in any layout, its autoencoder, its encoders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fsvideo.checkpoint.distributed import latest_iteration, load_checkpoint, read_record
from megatron_fsvideo.checkpoint.release import load_fsae
from megatron_fsvideo.config import DiTJob, ParallelConfig, from_dict
from megatron_fsvideo.models.dit import DiTModel, build_dit
from megatron_fsvideo.models.fsae import FSAE, fingerprint
from megatron_fsvideo.parallel.groups import ProcessGroups


@dataclass
class LoadedDiT:
    """A trained DiT and what its checkpoint says about it.

    Attributes:
        job: the job it was trained by; the architecture is `job.model`.
        data: the dataset's description: autoencoder, encoders, latent mean and std, buckets, fps.
    """

    model: DiTModel
    job: DiTJob
    data: dict[str, Any]
    iteration: int


def load_dit(folder: str | Path, parallel: ParallelConfig, pgs: ProcessGroups, use_ema: bool = True) -> LoadedDiT:
    """Load the newest checkpoint of a training run's --save folder into this layout.

    Args:
        use_ema: take the moving average of the weights, where the run kept one.

    Raises:
        ValueError: no checkpoint there, or a damaged one; pipeline parallelism, which generation does not use.
    """
    if parallel.pipeline_model_parallel_size > 1:
        raise ValueError("generation runs with tensor and context parallelism, not with pipeline stages")
    iteration = latest_iteration(Path(folder))
    if iteration is None:
        raise ValueError(f"{folder} holds no checkpoint of pretrain_dit.py (no latest_checkpointed_iteration.txt)")
    record = read_record(Path(folder), iteration)
    job = from_dict(DiTJob, record["job"])
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    model = build_dit(job.model, parallel, pgs, params_dtype=dtype)
    _load_weights(model, Path(folder), iteration, use_ema and job.optimizer.ema_decay > 0)
    return LoadedDiT(model.eval().requires_grad_(False), job, record["data"], iteration)


def load_autoencoder(data: dict[str, Any], override: str | None, device: torch.device, dtype: torch.dtype) -> FSAE:
    """The autoencoder that made the training latents.

    Args:
        data: from the checkpoint.
        dtype: of its weights and activations.
        override: where it is now, when it has moved.

    Raises:
        ValueError: not found, or another autoencoder.
    """
    path = override or data["autoencoder"]["path"]
    if not Path(path).exists():
        raise ValueError(f"the autoencoder {path} does not exist; say where it is now with --fsae")
    fsae = load_fsae(path, device)
    found, expected = fingerprint(fsae), data["autoencoder"]["fingerprint"]
    if found != expected:
        raise ValueError(
            f"the DiT was trained on latents of the autoencoder {expected[:12]}, {path} is {found[:12]}: "
            "its latents mean something else to this autoencoder"
        )
    return fsae.to(dtype)


def _load_weights(model: DiTModel, folder: Path, iteration: int, averaged: bool) -> None:
    """Read the trained or the averaged weights, which a checkpoint keeps beside each other."""
    wanted = model.sharded_state_dict()
    if averaged:
        for tensor in wanted.values():
            tensor.key = f"ema.{tensor.key}"
            tensor.data, tensor.dtype = tensor.data.detach().float(), torch.float32
    content = load_checkpoint(folder, iteration, {"weights": wanted})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in content["weights"].items():
            parameters[name].copy_(value)
