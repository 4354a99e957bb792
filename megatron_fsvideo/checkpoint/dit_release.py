"""Release folders of a DiT: sharded safetensors under our names, and a config.json that says what the model is.

    config.json                     format, the job (its architecture is job.model), the dataset's description, origin
    model.safetensors               or model-00001-of-0000N.safetensors with model.safetensors.index.json

What leaves a training run for other people; like every release it cannot run code. Weights only: one set of them, the
trained or the averaged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fsvideo.checkpoint.release import CONFIG_FILE
from megatron_fsvideo.checkpoint.safetensors_shards import SafetensorsFolder
from megatron_fsvideo.config import DiTJob, from_dict, to_dict
from megatron_fsvideo.data.text_files import read_object

DIT_FORMAT = "megatron_fsvideo.dit"
DIT_BASENAME = "model"


@dataclass(frozen=True)
class DiTRecord:
    """What goes with a set of weights.

    Attributes:
        job: the job they were trained by, or would be; the architecture is `job.model`.
        data: the dataset's description (`LatentDataset.description`), None before training on one.
        iteration: optimizer steps they had.
        origin: where they came from, as JSON; empty for weights of a training run.
    """

    job: DiTJob
    data: dict[str, Any] | None
    iteration: int
    origin: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of a release's config.json."""
        return {
            "format": DIT_FORMAT,
            "job": to_dict(self.job),
            "data": self.data,
            "iteration": self.iteration,
            "origin": self.origin,
        }


def is_dit_release(folder: Path) -> bool:
    """Whether a folder says that it is a release of a DiT."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_config(folder).get("format") == DIT_FORMAT


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        ValueError: it is missing, or no JSON object.
    """
    return read_object(folder / CONFIG_FILE)


def open_dit_release(folder: Path) -> tuple[DiTRecord, SafetensorsFolder]:
    """A release's record and its tensors, which are read when asked for.

    Raises:
        ValueError: a file is missing or damaged.
    """
    values = read_config(folder)
    if values.get("format") != DIT_FORMAT:
        raise ValueError(f"{folder} holds {values.get('format')!r}, not a DiT ({DIT_FORMAT!r})")
    try:
        job = from_dict(DiTJob, values["job"])
        record = DiTRecord(job, values["data"], values["iteration"], values["origin"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error!r}") from error
    return record, SafetensorsFolder(folder)
