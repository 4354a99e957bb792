"""Everything that a restarted run must know besides weights and optimizer: two counters.

Nothing else is needed, because all randomness belongs to (seed, sample, epoch) and the order of the data is a function
of (seed, consumed_samples): there is no generator state to save.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TrainState:
    """Where a run is.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: samples those steps used, over all ranks.
    """

    iteration: int = 0
    consumed_samples: int = 0

    def advance(self, num_samples: int) -> None:
        """Count one optimizer step."""
        self.iteration += 1
        self.consumed_samples += num_samples


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        metrics: name -> value; the names that every run has are `loss`, `grad_norm` and `learning_rate`.
        num_samples: samples used, over all ranks.
        num_tokens: tokens processed, over all ranks; 0 where that is no useful number.
        flops: floating-point operations of the model's forward and backward passes, over all ranks; 0 if not counted.
        data_wait: seconds spent waiting for data.
        images: name -> picture uint8 [height, width, 3] for TensorBoard, on rank zero.
        skipped: why the weights were not changed (a loss or gradient that is not finite), with the samples' names.
    """

    metrics: dict[str, float]
    num_samples: int
    num_tokens: int = 0
    flops: float = 0.0
    data_wait: float = 0.0
    images: dict[str, Tensor] = field(default_factory=dict)
    skipped: str | None = None
