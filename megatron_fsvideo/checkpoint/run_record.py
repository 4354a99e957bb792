"""What a checkpoint's job.json says: of each network what it is, and of the run what a resumed run must agree with.

    {"format": 2, "iteration": 100, "consumed_samples": 3200,
     "networks": {"dit": {"kind": "dit", "model": {...}, "diffusion": {...}, "codec": {...}, "bf16": true, ...}},
     "data": {...}, "order": {...}, "frozen": {"teacher": {"path": ..., "fingerprint": ...}},
     "fixed": {"phase": 2}, "job": {...}}

Readers ask for networks, never for the job that trained them. `job` is kept for people.
"""

from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
# Format 1 had one job each of two kinds, and no networks.
_OLD_FORMAT = 1


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
        raise ValueError(f"{where}/job.json has format {version!r}, this program reads {_OLD_FORMAT} and {FORMAT}")
    try:
        is_old = version == _OLD_FORMAT
        networks = old_networks(values) if is_old else values["networks"]
        parts = values.get("frozen", {}), values.get("fixed", {})
        run = RunDescription(values["job"], values.get("data"), values.get("order"), *parts)
        record = RunRecord(
            values["iteration"],
            values.get("consumed_samples", 0),
            networks,
            run,
            values.get("weights_only", False),
            is_old,
            values.get("origin", {}),
        )
        _check_types(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}/job.json is damaged: {error!r}") from error
    return record


def _check_types(record: RunRecord) -> None:
    counters = (record.iteration, record.consumed_samples)
    if not all(isinstance(count, int) and count >= 0 for count in counters):
        raise TypeError(f"iteration and consumed_samples are {counters}")
    for network in record.networks.values():
        if not isinstance(network["kind"], str) or not isinstance(network["model"], dict):
            raise TypeError("a network needs kind and model")


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
