"""The two counters that a restarted run needs in addition to weights and optimizer state.

Nothing else is needed: all random numbers depend on (seed, sample, epoch) and the order of the data is a function
of (seed, consumed_samples): there is no generator state to save.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        iteration: number of optimizer steps done.
        consumed_samples: number of samples used by those steps, over all ranks.
    """

    iteration: int = 0
    consumed_samples: int = 0

    def advance(self, num_samples: int) -> None:
        """Count one optimizer step."""
        self.iteration += 1
        self.consumed_samples += num_samples


@dataclass(frozen=True)
class StepResult:
    """Report of one optimizer step.

    Attributes:
        metrics: name -> value; every run has `loss`, `grad_norm` and `learning_rate`.
        num_samples: samples used, over all ranks.
        num_tokens: tokens processed, over all ranks; 0 for a network without tokens.
        flops: floating-point operations of the model's forward and backward passes, over all ranks; 0 if not counted.
        data_wait: seconds spent waiting for data.
        images: name -> picture uint8 [height, width, 3] for TensorBoard, on rank zero.
        skipped: why the weights did not change (loss or gradient not finite), with the names of the samples.
    """

    metrics: dict[str, float]
    num_samples: int
    num_tokens: int = 0
    flops: float = 0.0
    data_wait: float = 0.0
    images: dict[str, Tensor] = field(default_factory=dict)
    skipped: str | None = None
