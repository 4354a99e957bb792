"""Source of a conversion: a DiT's weights in any format, under our names and shapes, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.distributed import open_checkpoint
from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights
from megatron_fsvideo.checkpoint.dit_release import (
    DIT_FORMAT,
    DiTNetwork,
    DiTRecord,
    dit_of_run,
    open_dit_release,
    read_config,
)
from megatron_fsvideo.checkpoint.release import CONFIG_FILE
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder, TensorInfo
from megatron_fsvideo.checkpoint.save_folder import LATEST_FILE
from megatron_fsvideo.config import DiffusionConfig, DiTConfig
from megatron_fsvideo.config.rules import shown
from megatron_fsvideo.conversion.wan_config import (
    DIFFUSERS_CLASS,
    WAN_CLASS,
    config_from_diffusers,
    config_from_wan,
)
from megatron_fsvideo.conversion.wan_names import DIFFUSERS, WAN, Spelling, our_value, their_name, their_value

FORMATS = ("diffusers", "wan", "release", "distributed")
# Beginnings of the model's own names. Other names belong to the moving average and the optimizer's state.
_MODEL_PARTS = ("condition_embedder.", "patch_embedding.", "block.", "head.")
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """A DiT's weights in one of the formats.

    Attributes:
        where: the folder, for messages.
        kind: the format.
        stored: the tensors under the names of the format.
        spelling: the names of the format; None for our names.
        unused: tensors of the format that none of our models has.
    """

    where: str
    kind: str
    record: DiTRecord
    stored: SafetensorsFolder | DistributedWeights
    spelling: Spelling | None
    unused: tuple[str, ...] = ()

    @property
    def config(self) -> DiTConfig:
        """The architecture of the model."""
        return self.record.network.model

    def dtype(self, name: str) -> torch.dtype:
        """Number format in which one of our weights is stored."""
        return self.stored.infos[self._stored_name(name)].dtype

    def read(self, name: str) -> Tensor:
        """Read one of our weights, in our shape."""
        value = self.stored.read(self._stored_name(name))
        return value if self.spelling is None else our_value(name, value, self.config.patch_volume)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse a file that is not exactly the model which its config describes.

        Args:
            weights: the weights of that model, on the "meta" device.

        Raises:
            ValueError: the message names tensors that are missing, unexpected, or of another shape.
        """
        expected = {self._stored_name(name): self._stored_shape(name, value) for name, value in weights.items()}
        found = {name: info.shape for name, info in self._of_the_model().items()}
        wrong = [name for name in sorted(set(expected) | set(found)) if expected.get(name) != found.get(name)]
        if wrong:
            lines = "; ".join(_line(name, found, expected) for name in wrong[:_SHOWN])
            raise ValueError(
                f"{self.where} is not the model that its config describes; {len(wrong)} tensors differ from the "
                f"{len(expected)} expected: {lines}"
            )

    def _of_the_model(self) -> dict[str, TensorInfo]:
        infos = self.stored.infos
        if self.kind == "distributed":
            return {name: info for name, info in infos.items() if name.startswith(_MODEL_PARTS)}
        return {name: info for name, info in infos.items() if name not in self.unused}

    def _stored_name(self, name: str) -> str:
        return name if self.spelling is None else their_name(name, self.spelling)

    def _stored_shape(self, name: str, value: Tensor) -> tuple[int, ...]:
        return tuple((value if self.spelling is None else their_value(name, value, self.config)).shape)


def open_source(folder: Path, kind: str | None, use_ema: bool) -> Source:
    """Open a folder of any format.

    Args:
        kind: one of FORMATS; None recognises it.
        use_ema: take the moving average of the weights from a distributed checkpoint that has one.

    Raises:
        ValueError: the format is not recognised, or the folder is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"--input {folder} is not a folder")
    kind = kind or recognise(folder)
    if kind == "release":
        record, stored = open_dit_release(folder)
        return Source(str(folder), kind, record, stored, None)
    if kind == "distributed":
        return _open_distributed(folder, use_ema)
    return _open_foreign(_inside_pipeline(folder), kind)


def recognise(folder: Path) -> str:
    """Recognise the format of a folder from its files.

    Raises:
        ValueError: the folder has none of the formats.
    """
    if (folder / LATEST_FILE).is_file():
        return "distributed"
    inside = _inside_pipeline(folder)
    if (inside / CONFIG_FILE).is_file():
        config = read_config(inside)
        if config.get("format") == DIT_FORMAT:
            return "release"
        kinds = {DIFFUSERS_CLASS: "diffusers", WAN_CLASS: "wan"}
        name = config.get("_class_name")
        if isinstance(name, str) and name in kinds:
            return kinds[name]
        said = f"config.json says _class_name {shown(config.get('_class_name'))}, format {shown(config.get('format'))}"
    else:
        said = f"it has neither {LATEST_FILE} nor config.json"
    raise ValueError(f"the format of {folder} is unknown: {said}; known are {', '.join(FORMATS)} (--input-format)")


def _inside_pipeline(folder: Path) -> Path:
    """The folder of the transformer if `folder` is a diffusers pipeline, else `folder` itself."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def _open_foreign(folder: Path, kind: str) -> Source:
    values, stored = read_config(folder), SafetensorsFolder(folder)
    where = str(folder / CONFIG_FILE)
    try:
        return _foreign(folder, kind, values, stored)
    except ValueError as error:
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error


def _foreign(folder: Path, kind: str, values: dict[str, Any], stored: SafetensorsFolder) -> Source:
    where, unused = str(folder / CONFIG_FILE), tuple[str, ...]()
    if kind == "diffusers":
        # Older versions stored a gain that the forward pass never used.
        unused = tuple(name for name in stored.infos if name.endswith(".attn2.norm_added_q.weight"))
        config, spelling = config_from_diffusers(values, where), DIFFUSERS
    else:
        shapes = {name: info.shape for name, info in stored.infos.items()}
        config, spelling = config_from_wan(values, shapes, where), WAN
    is_half = any(info.dtype in (torch.bfloat16, torch.float16) for info in stored.infos.values())
    network = DiTNetwork(config, DiffusionConfig(), is_half)
    return Source(str(folder), kind, DiTRecord(network, None, 0, {}), stored, spelling, unused)


def _open_distributed(folder: Path, use_ema: bool) -> Source:
    checkpoint = open_checkpoint(folder)
    name, record = dit_of_run(checkpoint.record, str(folder))
    averaged = use_ema and record.network.average
    prefix = checkpoint.record.average_prefix(name) if averaged else checkpoint.record.model_prefix(name)
    return Source(str(folder), "distributed", record, DistributedWeights(checkpoint.path, prefix), None)


def _line(name: str, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
    if name not in found:
        return f"{name} {list(expected[name])} is missing"
    if name not in expected:
        return f"{name} {list(found[name])} is unexpected"
    return f"{name} is {list(found[name])}, expected {list(expected[name])}"
