"""Train the base DiT or the refiner on a latent dataset (paper section 3).

    torchrun --nproc-per-node 2 pretrain_dit.py --preset dit_debug --tensor-model-parallel-size 2 \
        --data-path runs/latents --save runs/dit --load runs/dit --tensorboard-dir runs/dit/logs

The dataset is made by tools/preprocess_latents.py. Flags: --help; presets: megatron_fsvideo/config/presets.py.
"""

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job, run_script
from megatron_fsvideo.models.backends import check_backend
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.profiling import IterationProfiler, profile_folder
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
        logger = MetricsLogger(
            job.logging,
            job.training.train_iters,
            state.iteration,
            is_rank_zero=pgs.is_rank_zero,
            world_size=pgs.world_size,
        )
        train(step, state, job.training, job.checkpoint, logger, pgs.any_rank, profiler)
    groups.shutdown()


def main() -> None:
    """Parse the command line and train."""
    pretrain(parse_job(DiTJob, DIT_PRESETS))


if __name__ == "__main__":
    run_script(main)
