"""Clips are read before a step asks for them, and are those that it would have read itself."""

import threading
import time
from pathlib import Path

import pytest
import torch
from test_bucketed_clips import bucket_job, video_dir  # noqa: F401

from megatron_fsvideo.data.read_ahead import READY_PER_WORKER, ReadAhead
from megatron_fsvideo.tasks.fsae.batches import FSAEBatches


def test_reading_keeps_ahead_of_a_step_that_takes_half_its_time():
    reading, step, count = 0.04, 0.02, 30

    def read(key: int) -> int:
        time.sleep(reading)
        return key

    ahead = ReadAhead(read, num_workers=4)
    ahead.expect(range(count))
    waited = 0.0
    for key in range(count):
        began = time.perf_counter()
        assert ahead.take(key) == key
        waited += time.perf_counter() - began
        time.sleep(step)
    # Read when asked for, it would wait for 1.2 s.
    assert waited < 0.25 * count * reading


def test_what_waits_is_bounded_and_follows_the_latest_expectation():
    begun: list[int] = []
    gate = threading.Event()

    def read(key: int) -> int:
        begun.append(key)
        gate.wait(10)
        return 10 * key

    ahead = ReadAhead(read, num_workers=1)
    ahead.expect(range(100))
    gate.set()
    assert ahead.take(0) == 0
    time.sleep(0.2)
    assert len(begun) <= 1 + READY_PER_WORKER + 1
    ahead.expect([7, 8])
    assert [ahead.take(key) for key in (7, 8, 50)] == [70, 80, 500]
    assert ReadAhead(read, num_workers=0).take(3) == 30


def test_errors_come_where_the_result_is_taken():
    def read(key: int) -> int:
        raise ValueError(f"clip {key}")

    ahead = ReadAhead(read, num_workers=2)
    ahead.expect([1, 2])
    with pytest.raises(ValueError, match="clip 2"):
        ahead.take(2)


def test_batches_are_equal_with_and_without_threads(video_dir: Path):  # noqa: F811
    plain, ahead = (FSAEBatches(bucket_job(video_dir, num_workers=n), dp_size=2) for n in (0, 3))
    consumed = 0
    for iteration in range(3):
        plan = ahead.plan(iteration)
        ahead.expect(iteration, consumed, lambda plan: (1, 2))
        per_rank = plan.num_samples // 2
        for start in range(consumed + per_rank, consumed + plan.num_samples, plan.micro_batch_size):
            assert torch.equal(ahead.read(start, plan), plain.read(start, plan))
        consumed += plan.num_samples
