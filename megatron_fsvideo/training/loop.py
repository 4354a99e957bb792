"""The training loop of every job. Jobs differ only in their task."""

import time
from collections.abc import Callable

from megatron_fsvideo.config import CheckpointConfig, TrainingConfig
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.profiling import NO_PROFILE, IterationProfiler
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.signals import ExitRequest
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.task import Task

AnyRank = Callable[[list[bool]], list[bool]]


def train(
    task: Task,
    checkpoints: RunCheckpoints,
    state: TrainState,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    logger: MetricsLogger,
    any_rank: AnyRank = list,
    profiler: IterationProfiler = NO_PROFILE,
) -> None:
    """Train from `state` to `training.train_iters`, or until the run is asked to leave; save, and return.

    Args:
        any_rank: returns the flags that any rank has set (`ProcessGroups.any_rank`); the default is for one process.

    Raises:
        ValueError: too many optimizer steps in a row were skipped, or a checkpoint could not be written.
    """
    first = state.iteration
    # A resumed run has already validated before it saved. A new stage has other data and validates again.
    if training.eval_iters > 0 and state.consumed_samples == 0:
        logger.log_validation(state, task.validate())

    saved = first if first > 0 else None
    skipped = 0
    with ExitRequest(training.exit_signal_handler, training.exit_duration_in_mins) as request, profiler:
        while state.iteration < training.train_iters:
            profiler.begin(state.iteration + 1)
            started = time.perf_counter()
            result = task.train_step(state)
            state.advance(result.num_samples)
            logger.log_step(state, result, time.perf_counter() - started)
            profiler.end(state.iteration)
            skipped = skipped + 1 if result.skipped else 0
            if skipped == training.max_consecutive_skipped:
                checkpoints.finish()
                raise ValueError(_too_many_skipped(skipped, result))

            is_last = state.iteration == training.train_iters
            if training.eval_iters > 0 and (is_last or _due(state.iteration, training.eval_interval)):
                logger.log_validation(state, task.validate())
            if (generated := task.generate(state)) is not None:
                logger.log_validation(state, generated.metrics)
                for name, image in generated.images.items():
                    logger.log_image(state.iteration, name, image)
            if checkpoint.save and (is_last or _due(state.iteration, checkpoint.save_interval)):
                checkpoints.save(state, task.networks)
                saved = state.iteration
            is_asked = _should_leave(checkpoints, state, request, any_rank, logger)
            if is_asked or _due(state.iteration - first, training.exit_interval):
                break

        if checkpoint.save and saved != state.iteration:
            checkpoints.save(state, task.networks)
        checkpoints.finish()
    logger.close()


def _should_leave(
    checkpoints: RunCheckpoints, state: TrainState, request: ExitRequest, any_rank: AnyRank, logger: MetricsLogger
) -> bool:
    """Let all ranks agree, at the end of an iteration, whether to leave and whether a checkpoint is complete."""
    is_saving, *flags = any_rank([checkpoints.is_saving(), *request.flags()])
    if not is_saving:
        checkpoints.finish()
    reason = request.explain(flags)
    if reason:
        logger.note(f"leaving after iteration {state.iteration}: {reason}")
    return reason is not None


def _too_many_skipped(count: int, last: StepResult) -> str:
    return (
        f"{count} optimizer steps in a row were skipped, as many as max_consecutive_skipped allows; the last: "
        f"{last.skipped}. Continue from the last checkpoint with a lower lr, or look for broken samples "
        "(docs/debugging.md)"
    )


def _due(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0
