"""Tasks as a run begins them, for tests that look into a process."""

from megatron_fsvideo.config import DiTJob
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.tasks.dit.task import DiTTask
from megatron_fsvideo.training.run import begin, checkpoints_of
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.state import TrainState


def begin_dit(job: DiTJob, pgs: ProcessGroups) -> tuple[DiTTask, RunCheckpoints, TrainState]:
    """The task, where it is saved, and where it begins or continues."""
    task = DiTTask(job, pgs)
    checkpoints = checkpoints_of(job, task, pgs)
    return task, checkpoints, begin(task, checkpoints)
