"""Count the memory of one training step of the autoencoder at any size, without a device that has it.

    python tools/account_fsae_memory.py --preset fsae_phase3 --clip 121x1024x1024 --out memory.json

The step's own code runs on fake tensors, which have sizes and no data, as one rank in the middle of those that share a
clip; every byte that torch's operators allocate is counted until it is freed. Not counted: the workspaces of
convolution libraries, fragmentation, the CUDA context, DINOv2 (phase 4). The gradients are those of the second step of
two, so that everything that stays from step to step is there. Flags are those of pretrain_fsae.py.
"""

from dataclasses import dataclass, field

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, parse_job, run_script, to_dict
from megatron_fsvideo.config.rules import Checked, PathText, Positive
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.outputs import check_outputs, write_json


@dataclass(frozen=True)
class AccountFlags(Checked):
    """what to count"""

    clip: PathText = "121x1024x1024"
    """Shape of the clips, frames x height x width."""
    out: PathText | None = None
    """JSON file to write."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""
    limit_gb: Positive = 80.0
    """Memory of a device in GB (10^9 bytes). The exit code is 1 if the step does not fit."""


@dataclass(frozen=True)
class AccountJob(FSAEJob):
    """Count the memory of one training step of the autoencoder."""

    account: AccountFlags = field(default_factory=AccountFlags)


def main() -> None:
    """Parse the command line, count, print and write."""
    job = parse_job(AccountJob, FSAE_PRESETS)
    from counted_step import account

    flags = job.account
    check_outputs([flags.out] if flags.out else [], overwrite=flags.overwrite)
    report = account(job, Bucket.parse(flags.clip))
    settings = {
        "phase": job.phase.phase,
        "context_parallel_size": job.parallel.context_parallel_size,
        "recompute_granularity": job.parallel.recompute_granularity,
        **to_dict(job.memory),
        **to_dict(job.perceptual),
    }
    report = {"clip": flags.clip, **settings, **report}
    for name, values in report["parts"].items():
        print(f"{name:32} then allocated {values['live_gb']:8.2f} GB   at most {values['peak_gb']:8.2f} GB")
    print(f"peak {report['peak_gb']:.2f} GB of {flags.limit_gb:g} GB, in the {report['peak_in']}")
    if flags.out is not None:
        write_json(flags.out, report)
    if report["peak_gb"] > flags.limit_gb:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
