"""What a checkpoint's job.json says: of each network what it is, and of the run what a resumed run must agree with.

    {"format": 2, "iteration": 100, "consumed_samples": 3200,
     "networks": {"dit": {"kind": "dit", "model": {...}, "diffusion": {...}, "codec": {...}, "bf16": true, ...}},
     "data": {...}, "order": {...}, "frozen": {"teacher": {"path": ..., "fingerprint": ...}},
     "fixed": {"phase": 2}, "job": {...}}

Readers ask for networks, never for the job that trained them. `job` is kept for people.
"""

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from megatron_fsvideo.config.rules import Count, shown
from megatron_fsvideo.data.schema import checked

FORMAT = 2
# Format 1 had one job each of two kinds, and no networks.
_OLD_FORMAT = 1
_Values = dict[str, Any]


class _Autoencoder(TypedDict):
    path: str
    fingerprint: str
    weights_fingerprint: NotRequired[str | None]


class DataRecord(TypedDict):
    """What a record says about the data, and the types."""

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
    """What a record says about one network, and the types."""

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
    """What is read from a job.json, and the type of each entry. Other entries are ignored."""

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
    """What a run brings to its checkpoints, besides its networks and where it is. Everything is JSON-able.

    Attributes:
        job: all that the command line said.
        data: what the data are (`LatentDataset.description`); None where the order of the data has no record.
        order: what decides which samples a batch holds (data/sample_order.py); None if there is no record of it.
        frozen: name -> path and fingerprint of a network that is used and not trained.
        fixed: name -> value of what may not change when a run continues, such as the phase of the autoencoder.
    """

    job: dict[str, Any]
    data: dict[str, Any] | None = None
    order: dict[str, Any] | None = None
    frozen: dict[str, dict[str, str]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A job.json.

    Attributes:
        networks: name -> record: `kind`, `model`, `bf16`, `average`, `optimizer`, and where it has them `diffusion`
            and `codec`.
        weights_only: there is no optimizer's state: weights that were converted.
        is_old: of format 1, whose tensors have other names and whose optimizer's state cannot be read.
        origin: where converted weights came from.
    """

    iteration: int
    consumed_samples: int
    networks: dict[str, dict[str, Any]]
    run: RunDescription
    weights_only: bool = False
    is_old: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of job.json, in the present format."""
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
        """What the names of a network's averaged weights begin with in the checkpoint."""
        return "ema." if self.is_old else f"{name}.ema."

    def model_prefix(self, name: str) -> str:
        """What the names of a network's weights begin with in the checkpoint."""
        return "" if self.is_old else f"{name}.model."


def parse_record(values: dict[str, Any], where: str) -> RunRecord:
    """Read a job.json of this or an earlier version.

    Args:
        where: the checkpoint's folder, for messages.

    Raises:
        ValueError: it lacks something, or is of another version.
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
    """The networks of a job of format 1, of which a DiT's alone has diffusion.

    Args:
        values: with `job` and `data`.
    """
    job = values["job"]
    common = {"bf16": job["training"]["bf16"], "average": job["optimizer"]["ema_decay"] > 0}
    optimizer = {"optimizer": job["optimizer"]["optimizer"]}
    if "diffusion" in job:
        codec = None if values["data"] is None else values["data"]["autoencoder"]
        parts = {"model": job["model"], "diffusion": job["diffusion"], "codec": codec, "optimizer": optimizer}
        return {"dit": {"kind": "dit", **parts, **common}}
    return {"fsae": {"kind": "fsae", "model": job["model"], "optimizer": optimizer, **common}}
