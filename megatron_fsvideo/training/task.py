"""The interface between a task and the training loop with its checkpoints."""

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
    """Figures and pictures that a task generated during training.

    Attributes:
        metrics: name -> value, logged as a validation.
        images: name -> picture uint8 [height, width, 3] for TensorBoard, on rank zero.
    """

    metrics: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """A job's networks, data and losses. Every rank calls each method at the same iterations.

    Attributes:
        networks: name of the section in checkpoints -> network that is trained and saved.
    """

    networks: Mapping[str, TrainedNetwork]

    @abstractmethod
    def train_step(self, state: TrainState) -> StepResult:
        """Do one optimizer step on the batch after `state.consumed_samples`, without changing `state`."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return validation metrics by name; called only when `eval_iters` is positive."""

    @abstractmethod
    def describe(self) -> RunDescription:
        """Describe the run for a checkpoint, including frozen networks, without the trained ones."""

    def generate(self, state: TrainState) -> Generated | None:
        """Generate what is due after this iteration; None if nothing is due."""
        return None

    def summary(self) -> list[str]:
        """Return lines about the data for the start-up summary."""
        return []

    def begins(self, record: RunRecord | None) -> None:  # noqa: B027  most tasks need nothing but the networks
        """Prepare for training; called once, after the networks have their starting weights.

        Args:
            record: record of the checkpoint that was loaded; None for initial weights.
        """

    def inherit(self, source: Path) -> None:
        """Initialize the networks from another run (`--init-from`).

        Raises:
            ValueError: this job does not support it.
        """
        raise ValueError(f"--init-from {source}: this job begins with another run's weights by --load and --finetune")

    def extra_files(self) -> ExtraFiles | None:
        """Further files for a checkpoint's folder."""
        return None
