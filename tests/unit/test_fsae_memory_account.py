"""Memory of a training step: counted on fake tensors, and measured where it can be run."""

import pytest
import torch

from megatron_fsvideo.benchmarking.peak_memory import peak_allocation
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.buckets import Bucket
from tests.unit.fsae_large_clips import CUTS, large_job
from tools.counted_step import ByteCounter, CountedStep, account


def test_the_counter_follows_tensors() -> None:
    with ByteCounter() as counter:
        with counter.part("two"):
            a = torch.zeros(1000)
            view = a[:10]
            b = a + 1
            assert counter.live == 8000
            del a, b
        assert counter.live == 4000, "a view keeps its storage"
        del view
    assert counter.live == 0 and counter.parts["two"] == (4000, 8000)


def measured_peak(job: FSAEJob, clip: Bucket) -> int:
    """Bytes that torch's allocator had given out at most, of two steps."""

    def two_steps() -> None:
        step = CountedStep(job, ByteCounter(), None)
        for _ in range(2):
            step.run(clip)

    return peak_allocation(two_steps, torch.device("cpu"))[1]


@pytest.mark.parametrize("phase, changes", [(3, {}), (3, CUTS), (5, CUTS)])
def test_the_count_is_what_is_allocated(phase: int, changes: dict[str, int], tmp_path) -> None:
    # In bf16 and without the discriminator, which is fp32: torch's fp32 conv3d on one CPU thread unfolds its input.
    job = large_job(phase, tmp_path, image_fraction=0.0, bf16=True, gan_weight=0.0, **changes)
    clip = Bucket.parse("9x96x96")
    counted = account(job, clip)["peak_bytes"]
    assert counted == pytest.approx(measured_peak(job, clip), rel=0.02)


def test_the_largest_clip_fits_80_gb() -> None:
    job = build_job(FSAEJob, FSAE_PRESETS["fsae_phase3"])
    assert job.parallel.context_parallel_size == 4
    report = account(job, Bucket.parse("121x1024x1024"))
    assert report["parts"]["weights and average"]["live_gb"] == pytest.approx(4 * 1.011 * 1.25, rel=0.06)
    assert report["peak_gb"] < 80
