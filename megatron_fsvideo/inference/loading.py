"""Loads what generation needs: the DiT in any layout, its autoencoder and its encoders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fsvideo.checkpoint.distributed import Checkpoint, open_checkpoint
from megatron_fsvideo.checkpoint.dit_release import (
    DiTNetwork,
    DiTRecord,
    dit_of_run,
    is_dit_release,
    open_dit_release,
)
from megatron_fsvideo.checkpoint.release import load_codec
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder
from megatron_fsvideo.config import DiTParallelConfig
from megatron_fsvideo.models.codecs import FSAECodec, is_same_encoder, spell_autoencoder
from megatron_fsvideo.models.dit import DiTModel, build_dit
from megatron_fsvideo.models.dit.weights import named_global_parameters, slice_of_whole
from megatron_fsvideo.parallel.groups import ProcessGroups


@dataclass
class LoadedDiT:
    """A trained DiT and its description in the checkpoint.

    Attributes:
        network: architecture and diffusion process of the DiT.
        data: description of the dataset (autoencoder, encoders, latent mean and std, buckets, fps); None if the DiT
            has not been trained on latents.
    """

    model: DiTModel
    network: DiTNetwork
    data: dict[str, Any] | None
    iteration: int


def load_dit(folder: str | Path, parallel: DiTParallelConfig, pgs: ProcessGroups, use_ema: bool = True) -> LoadedDiT:
    """Load the newest checkpoint of a training run's --save folder, or a release, into this layout.

    Args:
        use_ema: take the moving average of the weights if the run kept one.

    Raises:
        ValueError: the folder holds no checkpoint or a damaged one, the DiT was never trained on latents, or the
            layout has pipeline parallelism, which generation does not support.
    """
    if parallel.pipeline_model_parallel_size > 1:
        raise ValueError("generation runs with tensor and context parallelism, not with pipeline stages")
    loaded = load_model(folder, parallel, pgs, use_ema)
    if loaded.data is None:
        raise ValueError(
            f"{folder} was converted from another model and knows no autoencoder: train it on latents first "
            "(pretrain_dit.py --load ... --finetune)"
        )
    loaded.model.eval().requires_grad_(False)
    return loaded


def load_model(folder: str | Path, parallel: DiTParallelConfig, pgs: ProcessGroups, use_ema: bool) -> LoadedDiT:
    """Load the model of a release or checkpoint folder in this layout, for training or for use.

    Raises:
        ValueError: the folder holds neither, it is damaged, or its weights do not fit its record.
    """
    if is_dit_release(Path(folder)):
        record, stored = open_dit_release(Path(folder))
        model = _build(record, parallel, pgs)
        _load_release(model, str(folder), stored)
    else:
        checkpoint = open_checkpoint(Path(folder), pgs)
        name, record = dit_of_run(checkpoint.record, str(folder))
        model = _build(record, parallel, pgs)
        _load_weights(model, checkpoint, name, use_ema and record.network.average)
    return LoadedDiT(model, record.network, record.data, record.iteration)


def _build(record: DiTRecord, parallel: DiTParallelConfig, pgs: ProcessGroups) -> DiTModel:
    dtype = torch.bfloat16 if record.network.bf16 else torch.float32
    return build_dit(record.network.model, parallel, pgs, params_dtype=dtype)


def load_autoencoder(data: dict[str, Any], override: str | None, device: torch.device, dtype: torch.dtype) -> FSAECodec:
    """Load an autoencoder whose encoder made the training latents, with any decoder trained for that encoder.

    Args:
        data: description of the dataset in the checkpoint.
        override: folder of the autoencoder, if it has moved or has another decoder.
        dtype: type of the autoencoder's weights and activations.

    Raises:
        ValueError: the autoencoder is not found, or has another encoder.
    """
    record = data["autoencoder"]
    path = override or record["path"]
    if not Path(path).exists():
        raise ValueError(f"the autoencoder {path} does not exist; say where it is now with --fsae")
    codec = load_codec(path)
    if not is_same_encoder(codec.identity.record(), _completed(record)):
        raise ValueError(
            f"the DiT was trained on latents of the autoencoder {spell_autoencoder(record)}, {path} has another "
            f"encoder ({codec.identity.encoder[:12]}): its latents mean something else"
        )
    return codec.to(device, dtype)


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """An autoencoder's record. An old record gets its encoder's fingerprint if the weights have not moved."""
    if "encoder_fingerprint" in record or not Path(record["path"]).exists():
        return record
    identity = load_codec(record["path"]).identity
    return record | identity.record() if identity.weights == record["fingerprint"] else record


@torch.no_grad()
def _load_release(model: DiTModel, folder: str, stored: SafetensorsFolder) -> None:
    """Copy this rank's slices from the files, one weight after another."""
    parameters = dict(named_global_parameters(model))
    if wrong := sorted(set(parameters) ^ set(stored.infos)):
        raise ValueError(f"{folder} does not fit its config in {len(wrong)} weights, first {wrong[0]}")
    for name, parameter in parameters.items():
        part = slice_of_whole(stored.read(name), parameter, model.pgs.tp_rank, model.pgs.tp_size)
        if part.shape != parameter.shape:
            raise ValueError(f"{folder}: {name} is {list(stored.infos[name].shape)}, which does not fit the config")
        parameter.copy_(part)


def _load_weights(model: DiTModel, checkpoint: Checkpoint, name: str, averaged: bool) -> None:
    """Read the trained or the averaged weights of a checkpoint, which holds both."""
    prefix = checkpoint.record.average_prefix(name) if averaged else checkpoint.record.model_prefix(name)
    wanted = model.sharded_state_dict()
    for tensor in wanted.values():
        tensor.key = f"{prefix}{tensor.key}"
        if averaged:
            tensor.data, tensor.dtype = tensor.data.detach().float(), torch.float32
    content = checkpoint.load({"weights": wanted})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in content["weights"].items():
            parameters[name].copy_(value)
