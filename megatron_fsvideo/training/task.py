"""What the loop and the checkpoints ask of a job at work."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord
from megatron_fsvideo.checkpoint.sharded_state import ExtraFiles
from megatron_fsvideo.training.network import TrainedNetwork
from megatron_fsvideo.training.state import StepResult, TrainState


@dataclass(frozen=True)
class Generated:
    """What a task has generated to be looked at.

    Attributes:
        metrics: name -> value, logged as a validation.
        images: name -> picture uint8 [height, width, 3] for TensorBoard, on rank zero.
    """

    metrics: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """A job's networks, data and losses. Every rank calls each method at the same iterations.

    Attributes:
        networks: what is trained and saved, by the name of its section in checkpoints.
    """

    networks: Mapping[str, TrainedNetwork]

    @abstractmethod
    def train_step(self, state: TrainState) -> StepResult:
        """One optimizer step on the batch after `state.consumed_samples`. Must not change `state`."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation metrics, by name; called only when `eval_iters` is positive."""

    @abstractmethod
    def describe(self) -> RunDescription:
        """What a checkpoint says of the run besides its trained networks; frozen ones are named in it."""

    def generate(self, state: TrainState) -> Generated | None:
        """What is to be shown after this iteration; None where nothing is due."""
        return None

    def summary(self) -> list[str]:
        """Lines about the data, for whoever starts the run."""
        return []

    def begins(self, record: RunRecord | None) -> None:  # noqa: B027  most tasks need nothing but the networks
        """Called once, when the networks have the weights to start with.

        Args:
            record: of the checkpoint that they were loaded from; None for initial weights.
        """

    def inherit(self, source: Path) -> None:
        """Begin with the networks of another run (`--init-from`).

        Raises:
            ValueError: this job cannot.
        """
        raise ValueError(f"--init-from {source}: this job begins with another run's weights by --load and --finetune")

    def extra_files(self) -> ExtraFiles | None:
        """What else lies in a checkpoint's folder."""
        return None
