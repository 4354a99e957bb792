"""The stage scripts of examples/dit: what they would run, by stand-ins for SLURM's commands, and whether it fits."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, check_token_count, parse_job
from megatron_fsvideo.data.batch_sizes import micro_batch_sizes
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.models.flops import Rows
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.memory import peak_memory
from megatron_fsvideo.tasks.dit.batches import sharing, step_sizes

ROOT = Path(__file__).parents[2]
STUBS = {
    "scontrol": "#!/bin/sh\necho localhost\n",
    "srun": '#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n',
    "torchrun": '#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n',
    "python": '#!/bin/sh\necho \'key {"caption": "pan left"}\'\n',
}
# The buckets that docs/pretraining.md names, by side of the square.
BUCKETS = {
    256: ("256x256", "256x320", "320x256", "192x256", "256x192"),
    512: ("512x512", "384x640", "640x384"),
}
FRAMES = {"stage1": 1, "stage2": 121, "stage3": 121, "sft": 121}
GIGABYTES = {"h100": 80, "h200": 141}
RESERVED = 6


def job_of(script: str, folder: Path, **variables: str) -> DiTJob:
    """The last command that a script runs, parsed."""
    for name, text in STUBS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "ARGUMENTS": str(folder / "arguments")}
    environment |= {"STAGES": str(folder), "SLURM_JOB_NODELIST": "n"} | variables
    done = subprocess.run(["bash", ROOT / script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = (folder / "arguments").read_text().splitlines()
    return parse_job(DiTJob, DIT_PRESETS, words[words.index("pretrain_dit.py") + 1 :])


@pytest.mark.parametrize("nodes", [1, 8, 32])
@pytest.mark.parametrize("gpu", GIGABYTES)
@pytest.mark.parametrize("stage", FRAMES)
def test_a_slurm_stage_fits_its_gpus_and_shares_its_buckets(stage, gpu, nodes, tmp_path):
    job = job_of(f"examples/dit/{stage}_slurm.sh", tmp_path, GPU=gpu, SLURM_JOB_NUM_NODES=str(nodes))
    parallel, side = job.parallel, job.data.bucket_resolution
    dp_size = 8 * nodes // parallel.model_parallel_size
    names = [f"{FRAMES[stage]}x{sides}" for sides in BUCKETS[side]]
    tokens = {Bucket.parse(name): Bucket.parse(name).num_tokens(64) for name in names}
    for bucket, count in tokens.items():
        check_token_count(count, str(bucket), parallel)
        assert abs(bucket.height * bucket.width - side**2) <= side**2 / 4
    batches = step_sizes(tokens, job.training, job.data)
    budget = job.data.tokens_per_micro_batch
    for bucket, size in micro_batch_sizes(batches, sharing(tokens, job, dp_size)).items():
        most = max(1, budget // tokens[bucket])
        assert size >= 0.5 * most, f"micro-batches of {bucket} have {size} samples, where {most} fit"
        assert batches[bucket] * tokens[bucket] == pytest.approx(
            job.training.global_batch_size * max(tokens.values()), rel=0.1
        )
        case = Case(job.model, parallel, Rows(tokens[bucket]), size, batches[bucket] // (size * dp_size), dp_size)
        needed = sum(peak_memory(case)[1].values()) / 1e9
        assert needed <= GIGABYTES[gpu] - RESERVED, f"{bucket}: {needed:.1f} GB"


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_each_stage_continues_the_one_before(kind, tmp_path):
    jobs = [job_of(f"examples/dit/{stage}_{kind}.sh", tmp_path) for stage in FRAMES]
    for before, after in zip(jobs, jobs[1:], strict=False):
        assert after.checkpoint.load == before.checkpoint.save != after.checkpoint.save
        assert after.model == before.model and after.optimizer.optimizer == before.optimizer.optimizer
        assert after.training.seed != before.training.seed
    assert [job.stage.new_stage for job in jobs] == [False, True, True, False]
    assert [job.checkpoint.finetune for job in jobs] == [False, False, False, True]
    ends = [job.training.train_iters for job in jobs[:3]]
    assert (ends[0], ends[1] - ends[0], ends[2] - ends[1]) == (ends[0], 2 * ends[0], 2 * ends[0]), "steps 1 : 2 : 2"
    assert jobs[3].data.sample_list is not None


def test_stage_one_may_begin_with_converted_weights(tmp_path):
    job = job_of("examples/dit/stage1_slurm.sh", tmp_path, START="wan_start")
    assert job.checkpoint.finetune and job.checkpoint.load == "wan_start"


def test_a_layout_that_nobody_planned_is_named(tmp_path):
    with pytest.raises(AssertionError, match="no layout for GPU=b200 on 2 nodes"):
        job_of("examples/dit/stage2_slurm.sh", tmp_path, GPU="b200", SLURM_JOB_NUM_NODES="2")
