"""Train the video autoencoder on video files, in six phases (paper section 2.2).

    python pretrain_fsae.py --preset fsae_debug --video-dir videos --save runs/fsae --load runs/fsae
    torchrun --nproc-per-node 8 pretrain_fsae.py --preset fsae_phase1 --video-dir videos --save runs/fsae_phase1 ...
    torchrun --nproc-per-node 8 pretrain_fsae.py --preset fsae_phase2 --init-from runs/fsae_phase1 ...

The --save folder can be given to tools/preprocess_latents.py and tools/evaluate_fsae.py at once. Flags: --help; what
the phases do: docs/fsae_training.md; presets: megatron_fsvideo/config/presets.py.
"""

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, parse_job, run_script
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.profiling import IterationProfiler, profile_folder
from megatron_fsvideo.training.steps.fsae import FSAEStep
from megatron_fsvideo.training.watchdog import Watchdog


def pretrain(job: FSAEJob) -> None:
    """Build everything, continue from a checkpoint if there is one, train."""
    pgs = groups.initialize(job.parallel)
    profiler = IterationProfiler(job.profiling, profile_folder(job.logging, job.checkpoint), pgs.rank)
    with Watchdog(pgs, 60 * job.parallel.distributed_timeout_minutes) as watchdog:
        step = FSAEStep(job, pgs)
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
    pretrain(parse_job(FSAEJob, FSAE_PRESETS))


if __name__ == "__main__":
    run_script(main)
