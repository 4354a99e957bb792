"""The record in a checkpoint's job.json: a description of each network, and what a resumed run must agree with.

    {"format": 2, "iteration": 100, "consumed_samples": 3200,
     "networks": {"dit": {"kind": "dit", "model": {...}, "diffusion": {...}, "codec": {...}, "bf16": true, ...}},
     "data": {...}, "order": {...}, "frozen": {"teacher": {"path": ..., "fingerprint": ...}},
     "fixed": {"phase": 2}, "job": {...}}

Programs read the networks, never the job that trained them. `job` is kept for people.
"""

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from megatron_fsvideo.config.rules import Count, shown
from megatron_fsvideo.data.schema import checked

FORMAT = 2
# Format 1 described a job of one of two kinds instead of networks.
_OLD_FORMAT = 1
_Values = dict[str, Any]


class _Autoencoder(TypedDict):
    path: str
    fingerprint: str
    weights_fingerprint: NotRequired[str | None]


class DataRecord(TypedDict):
    """Types of the entries that describe the data."""

    autoencoder: _Autoencoder
    text_encoder: _Values
    image_encoder: _Values
    latent_mean: list[float]
    latent_std: list[float]
    fps: float | None
    buckets: list[str]
    streams: NotRequired[list[tuple[str, Count, str]]]


class _List(TypedDict):
    name: str
    count: Count
    ordered: str
    sorted: str


class _Order(TypedDict):
    method: str
    settings: _Values
    lists: list[_List]


class NetworkRecord(TypedDict):
    """Types of the entries that describe one network."""

    kind: str
    model: _Values
    optimizer: NotRequired[_Values]
    diffusion: NotRequired[_Values | None]
    codec: NotRequired[_Values | None]
    bf16: NotRequired[bool]
    average: NotRequired[bool]


class _Frozen(TypedDict):
    path: str
    fingerprint: str


class _JobFile(TypedDict):
    """Types of the entries that are read from a job.json. Other entries are ignored."""

    iteration: Count
    consumed_samples: NotRequired[Count]
    job: _Values
    networks: NotRequired[dict[str, NetworkRecord]]
    data: NotRequired[DataRecord | None]
    order: NotRequired[_Order | None]
    frozen: NotRequired[dict[str, _Frozen]]
    fixed: NotRequired[_Values]
    weights_only: NotRequired[bool]
    origin: NotRequired[_Values]


@dataclass(frozen=True)
class RunDescription:
    """JSON-able description of a run in its checkpoints, without its networks and its counters.

    Attributes:
        job: all settings of the command line.
        data: description of the data (`LatentDataset.description`); None where the order of the data has no record.
        order: settings that decide which samples a batch holds (data/sample_order.py); None if there is no record.
        frozen: name -> path and fingerprint of each network that is used and not trained.
        fixed: name -> value of settings that may not change when a run continues, such as the autoencoder's phase.
    """

    job: dict[str, Any]
    data: dict[str, Any] | None = None
    order: dict[str, Any] | None = None
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """The content of a job.json.

    Attributes:
        networks: name -> record: `kind`, `model`, `bf16`, `average`, `optimizer`, and where it has them `diffusion`
            and `codec`.
        weights_only: the checkpoint holds converted weights without optimizer state.
        is_old: the format is 1: tensors have other names, and the optimizer state cannot be read.
        origin: source of converted weights.
    """

    iteration: int
    consumed_samples: int
    networks: dict[str, dict[str, Any]]
    run: RunDescription
    weights_only: bool = False
    is_old: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of job.json in the current format."""
        return {
            "format": FORMAT,
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "networks": self.networks,
            "data": self.run.data,
            "order": self.run.order,
            "frozen": self.run.frozen,
            "fixed": self.run.fixed,
            "weights_only": self.weights_only,
            "origin": self.origin,
            "job": self.run.job,
        }

    def average_prefix(self, name: str) -> str:
        """Prefix of a network's averaged weights in the checkpoint."""
        return "ema." if self.is_old else f"{name}.ema."

    def model_prefix(self, name: str) -> str:
        """Prefix of a network's weights in the checkpoint."""
        return "" if self.is_old else f"{name}.model."


def parse_record(values: dict[str, Any], where: str) -> RunRecord:
    """Read a job.json of this or an earlier version.

    Args:
        where: the checkpoint's folder, for messages.

    Raises:
        ValueError: the file lacks an entry, or has an unknown version.
    """
    version = values.get("format", _OLD_FORMAT)
    if version not in (FORMAT, _OLD_FORMAT):
        raise ValueError(f"{where}/job.json has format {shown(version)}, this program reads {_OLD_FORMAT} and {FORMAT}")
    path = f"{where}/job.json"
    checked(path, _JobFile, values)
    is_old = version == _OLD_FORMAT
    try:
        networks = old_networks(values) if is_old else values["networks"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    checked(path, dict[str, NetworkRecord], networks)
    parts = values.get("frozen", {}), values.get("fixed", {})
    return RunRecord(
        values["iteration"],
        values.get("consumed_samples", 0),
        networks,
        RunDescription(values["job"], values.get("data"), values.get("order"), *parts),
        values.get("weights_only", False),
        is_old,
        values.get("origin", {}),
    )


def old_networks(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Describe the networks of a job of format 1. Only a DiT has diffusion settings.

    Args:
        values: content of the file, with `job` and `data`.
    """
    job = values["job"]
    common = {"bf16": job["training"]["bf16"], "average": job["optimizer"]["ema_decay"] > 0}
    optimizer = {"optimizer": job["optimizer"]["optimizer"]}
    if "diffusion" in job:
        codec = None if values["data"] is None else values["data"]["autoencoder"]
        parts = {"model": job["model"], "diffusion": job["diffusion"], "codec": codec, "optimizer": optimizer}
        return {"dit": {"kind": "dit", **parts, **common}}
    return {"fsae": {"kind": "fsae", "model": job["model"], "optimizer": optimizer, **common}}
