"""Train the video autoencoder on video files, in six phases (paper section 2.2).

    python pretrain_fsae.py --preset fsae_debug --video-dir videos --save runs/fsae --load runs/fsae
    torchrun --nproc-per-node 8 pretrain_fsae.py --preset fsae_phase1 --video-dir videos --save runs/fsae_phase1 ...
    torchrun --nproc-per-node 8 pretrain_fsae.py --preset fsae_phase2 --init-from runs/fsae_phase1 ...

The --save folder can be given to tools/preprocess_latents.py and tools/evaluate_fsae.py at once. Flags: --help; what
the phases do: docs/fsae_training.md; presets: megatron_fsvideo/config/presets.py.
"""

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, parse_job, run_script


def main() -> None:
    """Parse the command line and train."""
    job = parse_job(FSAEJob, FSAE_PRESETS)
    from megatron_fsvideo.tasks.fsae.task import FSAETask
    from megatron_fsvideo.training.run import run

    run(job, FSAETask)


if __name__ == "__main__":
    run_script(main)
