"""Converts a DiT between formats, tensor by tensor, and starts FSVideo's model from a Wan checkpoint.

A `Conversion` says for every weight of the target model where it comes from: kept from the source, or fresh. Nothing is
read before everything has been checked, and no more than one tensor is in memory.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.checksums import checksums_of, write_checksums
from megatron_fsvideo.checkpoint.distributed_weights import write_distributed_weights
from megatron_fsvideo.checkpoint.dit_release import DIT_BASENAME, DIT_FORMAT, DIT_KIND, DiTNetwork, DiTRecord
from megatron_fsvideo.checkpoint.release import CONFIG_FILE
from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord
from megatron_fsvideo.checkpoint.safetensors_shards import TensorInfo, write_shards
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE, iteration_folder, name_latest
from megatron_fsvideo.config import DiTConfig, DiTJob, DiTParallelConfig
from megatron_fsvideo.conversion.source import Source
from megatron_fsvideo.conversion.wan_config import config_to_diffusers, config_to_wan
from megatron_fsvideo.conversion.wan_names import DIFFUSERS, WAN, their_name, their_value
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.dit.weights import initial_value, named_global_parameters
from megatron_fsvideo.parallel.groups import ProcessGroups

WAN_BASENAME = "diffusion_pytorch_model"
# A model for latents of another shape needs another patch embedding and head.
_GEOMETRY = ("latent_channels", "mask_channels", "patch_size")
# Further fields in which the new model may differ from its source: layer memory and the initial values of weights.
_MAY_DIFFER = (*_GEOMETRY, "layer_memory", "layer_memory_norm", "layer_memory_init", "q_norm_init")
_GEOMETRY_WEIGHTS = ("patch_embedding.", "head.proj_out.")


@dataclass(frozen=True)
class Conversion:
    """Content of the conversion's target.

    Attributes:
        record: the record of the target.
        infos: our name -> shape and number format in the target.
        fresh: our names of weights that the source lacks; they get the initial values of a new model.
        seed: seed of the fresh weights' initial values.
    """

    source: Source
    record: DiTRecord
    infos: dict[str, TensorInfo]
    fresh: tuple[str, ...]
    seed: int

    def read(self, name: str) -> Tensor:
        """Return one weight of the target."""
        info = self.infos[name]
        if name in self.fresh:
            value = initial_value(name, info.shape, self.record.network.model, self.seed)
        else:
            value = self.source.read(name)
        return value.to(info.dtype)

    @property
    def num_bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(info.num_bytes for info in self.infos.values())


def plan_conversion(
    source: Source, start: DiTJob | None, dtype: torch.dtype | None, pgs: ProcessGroups, seed: int
) -> Conversion:
    """Decide where every weight comes from.

    Args:
        start: the job whose model is to start from the source; None keeps the architecture of the source.
        dtype: number format of the weights, except for those that the model keeps in fp32; None keeps each as it is.
        pgs: groups of one process.

    Raises:
        ValueError: the source is not the model that its config describes, or cannot be the start of that job.
    """
    source.check(whole_weights(source.config, torch.float32, pgs))
    network = source.record.network
    if start is not None:
        check_start(source, start.model)
        network = DiTNetwork(start.model, start.diffusion, start.training.bf16)
    if dtype is not None:
        network = replace(network, bf16=dtype == torch.bfloat16)
    weights = whole_weights(network.model, torch.bfloat16 if network.bf16 else torch.float32, pgs)
    fresh = tuple(name for name in weights if _is_fresh(name, source.config, network.model))
    infos = {}
    for name, weight in weights.items():
        keeps = dtype is None and name not in fresh
        infos[name] = TensorInfo(tuple(weight.shape), source.dtype(name) if keeps else weight.dtype)
    return Conversion(source, _target_record(source, network, fresh), infos, fresh, seed)


def _target_record(source: Source, network: DiTNetwork, fresh: tuple[str, ...]) -> DiTRecord:
    record = source.record
    origin = {"format": source.kind, "folder": Path(source.where).name, "iteration": record.iteration}
    if not fresh:
        return DiTRecord(network, record.data, record.iteration, record.origin or origin | {"fresh": []})
    # A fresh patch embedding means that the latents are not those of the source's dataset.
    data = None if any(name.startswith(_GEOMETRY_WEIGHTS) for name in fresh) else record.data
    return DiTRecord(network, data, 0, origin | {"fresh": list(fresh)})


def whole_weights(config: DiTConfig, params_dtype: torch.dtype, pgs: ProcessGroups) -> dict[str, Tensor]:
    """Every weight of the model on the "meta" device, with its shape and number format (`params_dtype` or fp32)."""
    model = build_dit(config, DiTParallelConfig(), pgs, params_dtype=params_dtype, device=torch.device("meta"))
    return {name: parameter.detach() for name, parameter in named_global_parameters(model)}


def check_start(source: Source, target: DiTConfig) -> None:
    """Refuse a source whose architecture differs from the target's in more than latents and layer memory.

    Raises:
        ValueError: further fields differ; the message has their names and both values.
    """
    names = [field.name for field in fields(DiTConfig) if field.name not in _MAY_DIFFER]
    pairs = [(name, getattr(source.config, name), getattr(target, name)) for name in names]
    wrong = [f"{name} {theirs!r}, preset {ours!r}" for name, theirs, ours in pairs if theirs != ours]
    if source.config.layer_memory and not target.layer_memory:
        wrong.append("layer_memory True, preset False")
    if wrong:
        raise ValueError(f"{source.where} cannot start the preset's model: it has {'; '.join(wrong)}")


def write_target(
    conversion: Conversion, kind: str, output: Path, max_shard_size: int, progress: Callable[[], object]
) -> None:
    """Write the target; the folder appears whole or not at all.

    Args:
        progress: called for each weight that is read.

    Raises:
        ValueError: the format cannot hold this model, the output exists, or the disk is too small.
    """
    config_json = _foreign_config(conversion.record.network.model, kind)
    check_output(output, conversion.num_bytes)

    def read(name: str) -> Tensor:
        progress()
        return conversion.read(name)

    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        if kind == "distributed":
            _write_distributed(unfinished, conversion, read)
        elif kind == "release":
            write_shards(unfinished, DIT_BASENAME, conversion.infos, read, max_shard_size, {"format": DIT_FORMAT})
            _write_json(unfinished / CONFIG_FILE, conversion.record.to_json())
        else:
            _write_foreign(unfinished, conversion, kind, read, max_shard_size)
            _write_json(unfinished / CONFIG_FILE, config_json)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_output(output: Path, num_bytes: int) -> None:
    """Refuse an existing output, or a disk without room.

    Raises:
        ValueError: the output exists, or the disk is too small; the message has both sizes.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists already: name another folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise ValueError(f"--output {output} needs {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")


def _is_fresh(name: str, source: DiTConfig, target: DiTConfig) -> bool:
    if ".layer_memory." in name:
        return not source.layer_memory
    other_latents = any(getattr(source, field) != getattr(target, field) for field in _GEOMETRY)
    return other_latents and name.startswith(_GEOMETRY_WEIGHTS)


def _foreign_config(config: DiTConfig, kind: str) -> dict[str, Any] | None:
    makers = {"diffusers": config_to_diffusers, "wan": config_to_wan}
    return makers[kind](config) if kind in makers else None


def _write_foreign(
    folder: Path, conversion: Conversion, kind: str, read: Callable[[str], Tensor], max_shard_size: int
) -> None:
    config, spelling = conversion.record.network.model, {"diffusers": DIFFUSERS, "wan": WAN}[kind]
    ours = {their_name(name, spelling): name for name in conversion.infos}
    infos = {}
    for theirs, name in ours.items():
        info = conversion.infos[name]
        shape = their_value(name, torch.empty(info.shape, device="meta"), config).shape
        infos[theirs] = TensorInfo(tuple(shape), info.dtype)

    def read_theirs(theirs: str) -> Tensor:
        return their_value(ours[theirs], read(ours[theirs]), config)

    write_shards(folder, WAN_BASENAME, infos, read_theirs, max_shard_size, {"format": "pt"})


def _write_distributed(folder: Path, conversion: Conversion, read: Callable[[str], Tensor]) -> None:
    """Write a --save folder of pretrain_dit.py whose checkpoint, of iteration 0, holds only weights."""
    record, target = conversion.record, iteration_folder(folder, 0)
    target.mkdir()
    infos = {f"{DIT_KIND}.model.{name}": info for name, info in conversion.infos.items()}
    write_distributed_weights(target, infos, lambda key: read(key.removeprefix(f"{DIT_KIND}.model.")), common={})
    network = replace(record.network, average=False).to_json() | {"optimizer": {}}
    run = RunRecord(0, 0, {DIT_KIND: network}, RunDescription({}, record.data), weights_only=True, origin=record.origin)
    _write_json(target / JOB_FILE, run.to_json())
    write_checksums(target, checksums_of(target, sorted(path.name for path in target.iterdir())))
    name_latest(folder, 0)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
