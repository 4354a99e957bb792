"""Train the base DiT or the refiner on a latent dataset (paper section 3).

    torchrun --nproc-per-node 2 pretrain_dit.py --preset dit_debug --tensor-model-parallel-size 2 \
        --data-path runs/latents --save runs/dit --load runs/dit --tensorboard-dir runs/dit/logs

The dataset is made by tools/preprocess_latents.py. Flags: --help; presets: megatron_fsvideo/config/presets.py.
"""

from collections.abc import Callable

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job, run_script
from megatron_fsvideo.inference.validation_videos import ValidationVideos
from megatron_fsvideo.models.backends import check_backend
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.profiling import IterationProfiler, profile_folder
from megatron_fsvideo.training.state import TrainState
from megatron_fsvideo.training.steps.dit import DiTStep
from megatron_fsvideo.training.watchdog import Watchdog


def pretrain(job: DiTJob) -> None:
    """Build everything, continue from a checkpoint if there is one, train."""
    check_backend(job.parallel)
    pgs = groups.initialize(job.parallel)
    profiler = IterationProfiler(job.profiling, profile_folder(job.logging, job.checkpoint), pgs.rank)
    with Watchdog(pgs, 60 * job.parallel.distributed_timeout_minutes) as watchdog:
        step = DiTStep(job, pgs)
        state = watchdog.state = step.load()
        step.warn_of_frozen_routers()
        logger = MetricsLogger(
            job.logging,
            job.training.train_iters,
            state.iteration,
            is_rank_zero=pgs.is_rank_zero,
            world_size=pgs.world_size,
        )
        videos = sample_videos(job, step, logger, pgs) if job.sampling.sample_interval else None
        train(step, state, job.training, job.checkpoint, logger, pgs.any_rank, profiler, videos)
    groups.shutdown()


def sample_videos(
    job: DiTJob, step: DiTStep, logger: MetricsLogger, pgs: groups.ProcessGroups
) -> Callable[[TrainState], None]:
    """What generates the validation videos at their interval and shows them."""
    videos = ValidationVideos(job, step.chunks[0], step.valid_dataset, pgs)

    def after_iteration(state: TrainState) -> None:
        if state.iteration % job.sampling.sample_interval == 0 or state.iteration == job.training.train_iters:
            with step.averaged():
                error, sheet = videos.write(state.iteration)
            logger.log_validation(state, {"video_latent_mse": error})
            if sheet is not None:
                logger.log_image(state.iteration, "validation_videos", sheet)

    return after_iteration


def main() -> None:
    """Parse the command line and train."""
    pretrain(parse_job(DiTJob, DIT_PRESETS))


if __name__ == "__main__":
    run_script(main)
