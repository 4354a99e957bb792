"""Release folders of a DiT: sharded safetensors under our names, and a config.json that says what the model is.

    config.json                     format, the network's record, the dataset's description, origin
    model.safetensors               or model-00001-of-0000N.safetensors with model.safetensors.index.json

A release has one set of weights, the trained or the averaged ones, for use outside the training run. Like every release
it cannot run code.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megatron_fsvideo.checkpoint.release import CONFIG_FILE, FSAE_FORMAT
from megatron_fsvideo.checkpoint.run_record import DataRecord, NetworkRecord, RunDescription, RunRecord, old_networks
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder
from megatron_fsvideo.config import DiffusionConfig, DiTConfig, from_dict
from megatron_fsvideo.config.rules import Count, shown
from megatron_fsvideo.data.schema import checked
from megatron_fsvideo.data.text_files import read_object

DIT_FORMAT = "megatron_fsvideo.dit"
DIT_BASENAME = "model"
DIT_KIND = "dit"


@dataclass(frozen=True)
class DiTNetwork:
    """A DiT as checkpoints and releases describe it: enough to build it and to call it.

    Attributes:
        bf16: the weights are bfloat16, except those that the model keeps in fp32.
        average: the checkpoint also has a moving average of the weights.
    """

    model: DiTConfig
    diffusion: DiffusionConfig
    bf16: bool
    average: bool = False

    def to_json(self) -> dict[str, Any]:
        """The network's record in a job.json or config.json."""
        return {"kind": DIT_KIND} | asdict(self)

    @staticmethod
    def parse(values: dict[str, Any], where: str) -> "DiTNetwork":
        """Read the record that `to_json` made; other entries are ignored.

        Args:
            where: the file, for messages.

        Raises:
            ValueError, KeyError, TypeError: the record is damaged.
        """
        checked(where, NetworkRecord, values)
        model = from_dict(DiTConfig, values["model"], f"{where}: model")
        diffusion = from_dict(DiffusionConfig, values["diffusion"], f"{where}: diffusion")
        return DiTNetwork(model, diffusion, bool(values["bf16"]), bool(values["average"]))


class _Release(TypedDict):
    """Types of the entries that are read from a release's config.json."""

    network: NotRequired[NetworkRecord]
    job: NotRequired[dict[str, Any]]
    data: DataRecord | None
    iteration: Count
    origin: dict[str, Any]


@dataclass(frozen=True)
class DiTRecord:
    """The description that accompanies a set of weights.

    Attributes:
        data: the dataset's description (`LatentDataset.description`), None before training on one.
        iteration: number of optimizer steps of the weights.
        origin: source of converted weights, as JSON; empty for weights of a training run.
    """

    network: DiTNetwork
    data: dict[str, Any] | None
    iteration: int
    origin: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of a release's config.json."""
        return {
            "format": DIT_FORMAT,
            "network": self.network.to_json(),
            "data": self.data,
            "iteration": self.iteration,
            "origin": self.origin,
        }


def dit_of_run(record: RunRecord, where: str) -> tuple[str, DiTRecord]:
    """The first DiT of a training run, and its name.

    Raises:
        ValueError: the run trains none, or its record is damaged.
    """
    kinds = {name: network["kind"] for name, network in record.networks.items()}
    name = next((name for name, kind in kinds.items() if kind == DIT_KIND), None)
    if name is None:
        found = " and ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"
        raise ValueError(f"{where} is the --save folder of a run that trains {found}, not a DiT")
    try:
        network = DiTNetwork.parse(record.networks[name], f"{where}/job.json: {name}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the job.json of {where} is damaged: {error!r}") from error
    return name, DiTRecord(network, record.run.data, record.iteration, record.origin)


def record_of_release(folder: Path) -> RunRecord:
    """Read the record of a release, which has one network and no optimizer state.

    Raises:
        ValueError: another program made the folder, or it is damaged.
    """
    config = read_config(folder)
    if config.get("format") == FSAE_FORMAT and isinstance(config.get("model"), dict):
        networks, run = {"fsae": {"kind": "fsae", "model": config["model"]}}, RunDescription({})
    elif config.get("format") == DIT_FORMAT:
        record, _ = open_dit_release(folder)
        networks, run = {DIT_KIND: record.network.to_json()}, RunDescription({}, record.data)
    else:
        raise ValueError(
            f"{folder} holds a model of another program: convert it first with tools/convert_checkpoint.py --input "
            f"{folder} --output FOLDER --output-format release (an autoencoder: with tools/convert_fsae.py)"
        )
    return RunRecord(0, 0, networks, run, weights_only=True)


def is_dit_release(folder: Path) -> bool:
    """Whether a folder says that it is a release of a DiT."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_config(folder).get("format") == DIT_FORMAT


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        ValueError: the file is missing, or is no JSON object.
    """
    return read_object(folder / CONFIG_FILE)


def open_dit_release(folder: Path) -> tuple[DiTRecord, SafetensorsFolder]:
    """Open a release: its record, and its tensors, which are read on demand.

    Raises:
        ValueError: a file is missing or damaged.
    """
    values = read_config(folder)
    if values.get("format") != DIT_FORMAT:
        raise ValueError(f"{folder} holds {shown(values.get('format'))}, not a DiT ({DIT_FORMAT!r})")
    path = str(folder / CONFIG_FILE)
    try:
        checked(path, _Release, values)
        # Earlier releases hold the job instead of the network's record.
        network = values["network"] if "network" in values else old_networks(values)[DIT_KIND]
        record = DiTRecord(DiTNetwork.parse(network, path), values["data"], values["iteration"], values["origin"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return record, SafetensorsFolder(folder)
