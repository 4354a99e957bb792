"""Runs a training job of any task from start to end."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Protocol, TypeVar

from megatron_fsvideo.config import (
    CheckpointConfig,
    LoggingConfig,
    ParallelConfig,
    ProfilingConfig,
    StageConfig,
    TrainingConfig,
)
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.watchdog import Watchdog
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.profiling import IterationProfiler, profile_folder
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.state import TrainState
from megatron_fsvideo.training.summary import start_summary
from megatron_fsvideo.training.task import Task


class Job(Protocol):
    """The flag groups that every training job has."""

    parallel: ParallelConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    stage: StageConfig
    logging: LoggingConfig
    profiling: ProfilingConfig


JobT = TypeVar("JobT", bound=Job)


def run(job: JobT, build_task: Callable[[JobT, groups.ProcessGroups], Task]) -> None:
    """Join the processes, build the task, continue from a checkpoint if there is one, train, leave.

    Raises:
        ValueError: the job does not fit the machine, its data, or the content of its folders.
    """
    pgs = groups.initialize(job.parallel)
    profiler = IterationProfiler(job.profiling, profile_folder(job.logging, job.checkpoint), pgs.rank)
    with Watchdog(pgs, 60 * job.parallel.distributed_timeout_minutes) as watchdog, ExitStack() as stack:
        task = build_task(job, pgs)
        checkpoints = stack.enter_context(closing(checkpoints_of(job, task, pgs)))
        state = begin(task, checkpoints)
        watchdog.iteration = lambda: state.iteration
        lines = start_summary(task, state, checkpoints.start, job.training, job.checkpoint, pgs)
        if pgs.is_rank_zero:
            print("\n".join(lines), flush=True)
        logger = MetricsLogger(
            job.logging,
            job.training.train_iters,
            state.iteration,
            is_rank_zero=pgs.is_rank_zero,
            world_size=pgs.world_size,
        )
        train(task, checkpoints, state, job.training, job.checkpoint, logger, pgs.any_rank, profiler)
    groups.shutdown()


def checkpoints_of(job: Job, task: Task, pgs: groups.ProcessGroups) -> RunCheckpoints:
    """Build the `RunCheckpoints` that load and save the task's networks."""
    return RunCheckpoints(
        job.checkpoint,
        task.describe,
        pgs,
        train_iters=job.training.train_iters,
        new_stage=job.stage.new_stage,
        extra_files=task.extra_files,
        initialize=task.inherit,
    )


def begin(task: Task, checkpoints: RunCheckpoints) -> TrainState:
    """Bring a task to where the run begins or continues.

    Raises:
        ValueError: there is nothing to load where the flags say, it is damaged, or it does not belong to this run.
    """
    state = checkpoints.load(task.networks)
    task.begins(checkpoints.loaded)
    return state
