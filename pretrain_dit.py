"""Train the base DiT or the refiner on a latent dataset (paper section 3).

    torchrun --nproc-per-node 2 pretrain_dit.py --preset dit_quickstart --tensor-model-parallel-size 2 \
        --data-path runs/quickstart/latents/train --save runs/dit --load runs/dit --tensorboard-dir runs/dit/logs

The dataset is made by tools/preprocess_latents.py. Flags: --help; presets: megatron_fsvideo/config/presets.py.
"""

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job, run_script


def main() -> None:
    """Parse the command line and train."""
    job = parse_job(DiTJob, DIT_PRESETS)
    from megatron_fsvideo.models.backends import check_backend
    from megatron_fsvideo.tasks.dit.task import DiTTask
    from megatron_fsvideo.training.run import run

    check_backend(job.parallel)
    run(job, DiTTask)


if __name__ == "__main__":
    run_script(main)
