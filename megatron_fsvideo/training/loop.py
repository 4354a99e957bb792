"""The training loop, for every job. What differs between jobs is the step object."""

import time
from typing import Protocol

from megatron_fsvideo.config import CheckpointConfig, TrainingConfig
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.state import StepResult, TrainState


class TrainStep(Protocol):
    """What a job brings to the loop. Every rank calls each method at the same iterations."""

    def train_step(self, state: TrainState) -> StepResult:
        """One optimizer step on the batch after `state.consumed_samples`. Must not change `state`."""
        ...

    def validate(self) -> dict[str, float]:
        """Validation metrics, by name; called only when `eval_iters` is positive."""
        ...

    def save(self, state: TrainState) -> None:
        """Write a checkpoint from which `state.iteration + 1` can be done."""
        ...


def train(
    step: TrainStep,
    state: TrainState,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    logger: MetricsLogger,
) -> None:
    """Run from `state` to `training.train_iters`, or until `training.exit_interval` iterations are done here."""
    first = state.iteration
    # A resumed run has validated before it saved.
    if training.eval_iters > 0 and first == 0:
        logger.log_validation(state, step.validate())

    saved = first if first > 0 else None
    while state.iteration < training.train_iters:
        started = time.perf_counter()
        result = step.train_step(state)
        state.advance(result.num_samples)
        logger.log_step(state, result, time.perf_counter() - started)

        is_last = state.iteration == training.train_iters
        if training.eval_iters > 0 and (is_last or _due(state.iteration, training.eval_interval)):
            logger.log_validation(state, step.validate())
        if checkpoint.save and (is_last or _due(state.iteration, checkpoint.save_interval)):
            step.save(state)
            saved = state.iteration
        if _due(state.iteration - first, training.exit_interval):
            break

    if checkpoint.save and saved != state.iteration:
        step.save(state)
    logger.close()


def _due(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0
