"""Batches are a function of data, seed and flags: no layout changes them, and one that cannot share them is refused."""

import random
import re
from fractions import Fraction
from itertools import islice

import pytest

from megatron_fsvideo.config import DataConfig, DiTConfig, DiTJob, DiTParallelConfig, TrainingConfig
from megatron_fsvideo.data.batch_sizes import Sharing, global_batch_sizes, micro_batch_sizes
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import SampleStream
from megatron_fsvideo.data.sampler import BucketSampler, deal
from megatron_fsvideo.tasks.dit.batches import sharing, step_sizes

SMALL, WIDE, STILL = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(1, 32, 32)
TOKENS = {SMALL: 192, WIDE: 384, STILL: 64}


def test_batch_sizes_follow_the_largest_bucket():
    assert global_batch_sizes(TOKENS, 8) == {SMALL: 16, WIDE: 8, STILL: 48}
    # Nearest multiples: 8 x 384 / 290 is 10.6, 8 x 384 / 1,000 is 3.1.
    assert global_batch_sizes({WIDE: 384, SMALL: 290}, 8, multiple=4) == {WIDE: 8, SMALL: 12}
    assert global_batch_sizes({WIDE: 384, SMALL: 290}, 8) == {WIDE: 8, SMALL: 8}


def test_batch_sizes_follow_a_token_budget():
    assert global_batch_sizes(TOKENS, 1, tokens_per_batch=6400) == {SMALL: 33, WIDE: 17, STILL: 100}
    assert global_batch_sizes(TOKENS, 1, 8, tokens_per_batch=6400) == {SMALL: 32, WIDE: 16, STILL: 104}
    assert global_batch_sizes(TOKENS, 1, 8, tokens_per_batch=100) == {SMALL: 8, WIDE: 8, STILL: 8}


def test_a_batch_size_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="global_batch_size 12 is not a multiple of batch_size_multiple 8"):
        global_batch_sizes(TOKENS, 12, 8)
    with pytest.raises(ValueError, match="batch_size_multiple must be an integer of at least 0, got -1"):
        TrainingConfig(batch_size_multiple=-1)


def test_what_a_layout_cannot_share_is_refused_with_numbers_that_work():
    batches = {SMALL: 6, WIDE: 4, STILL: 12}
    with pytest.raises(ValueError) as refusal:
        micro_batch_sizes(batches, {bucket: Sharing(4, 1) for bucket in batches})
    assert str(refusal.value) == (
        "a batch of 9x32x32 has 6 samples, which is not a multiple of data-parallel size 4 x micro_batch_size 1 = 4 "
        "(nearest: 4 or 8); batch_size_multiple and global_batch_size that are multiples of 4 suit this layout; "
        "these batches suit data-parallel size 2"
    )
    with pytest.raises(ValueError, match=r"4 x pipeline size 2 x micro_batch_size 1 = 8 \(nearest: 8\)") as refusal:
        micro_batch_sizes(batches, {b: Sharing(4, 1, num_parts=2, parts_name="pipeline size") for b in batches})
    assert str(refusal.value).count("a batch of") == 3 and str(refusal.value).endswith("suit data-parallel size 1")
    with pytest.raises(ValueError, match="= 10 .* that are multiples of 10 suit") as refusal:
        micro_batch_sizes(batches, {bucket: Sharing(2, 5) for bucket in batches})
    assert "data-parallel size 1" not in str(refusal.value), "5 divides none of them"


def test_micro_batches_of_a_budget_shrink_until_they_divide():
    assert micro_batch_sizes({STILL: 24}, {STILL: Sharing(2, 5, may_shrink=True)}) == {STILL: 4}
    assert micro_batch_sizes({STILL: 24}, {STILL: Sharing(2, 50, may_shrink=True, num_parts=4)}) == {STILL: 3}
    with pytest.raises(ValueError, match="data-parallel size 5 = 5 .nearest: 20 or 25"):
        micro_batch_sizes({STILL: 24}, {STILL: Sharing(5, 4, may_shrink=True)})


def random_case(draw: random.Random) -> tuple[list[SampleStream], dict[Bucket, int], dict, dict, int]:
    """Streams, tokens, flags of the batches, flags of the layout, data-parallel size."""
    shapes = [Bucket(4 * k + 1, 32 * h, 32 * w) for k in range(4) for h in (1, 2) for w in (1, 2, 3)]
    buckets = draw.sample(shapes, draw.randint(1, 4))
    streams = [
        SampleStream(bucket, folder, size := draw.randint(1, 40), Fraction(size * draw.randint(1, 5), 3))
        for folder in range(draw.randint(1, 2))
        for bucket in buckets
    ]
    micro = draw.choice([1, 1, 2, 3])
    batch = micro * draw.choice([1, 2, 4, 6, 8])
    flags = {"global_batch_size": batch, "seed": draw.randint(0, 99)}
    if draw.random() < 0.4:
        flags["batch_size_multiple"] = draw.choice([k for k in range(1, batch + 1) if batch % k == 0])
    budgets = {"tokens_per_batch": draw.choice([0, 0, 100]), "tokens_per_micro_batch": draw.choice([0, 0, 15])}
    virtual = draw.choice([1, 2, 3])
    pp = draw.choice([1, 2, 4]) if virtual == 1 else draw.choice([2, 4])
    layout = {"micro_batch_size": 1 if budgets["tokens_per_micro_batch"] else micro, "pipeline_model_parallel_size": pp}
    layout["num_virtual_stages_per_pipeline_rank"] = virtual if virtual > 1 else None
    tokens = {bucket: bucket.num_tokens(32) for bucket in buckets}
    return streams, tokens, flags | budgets, layout, draw.choice([1, 2, 4])


def job_of(flags: dict, layout: dict) -> DiTJob:
    parallel = DiTParallelConfig(
        pipeline_model_parallel_size=layout["pipeline_model_parallel_size"],
        num_virtual_stages_per_pipeline_rank=layout["num_virtual_stages_per_pipeline_rank"],
    )
    budgets = {name: flags[name] for name in ("tokens_per_batch", "tokens_per_micro_batch")}
    others = {name: value for name, value in flags.items() if name not in budgets}
    training = TrainingConfig(micro_batch_size=layout["micro_batch_size"], **others)
    model = DiTConfig(num_layers=24, hidden_size=64, num_attention_heads=4)
    return DiTJob(model=model, parallel=parallel, training=training, data=DataConfig(**budgets))


def batches_of(job: DiTJob, streams: list[SampleStream], tokens: dict[Bucket, int], dp_size: int) -> list[tuple]:
    """The first 4 batches, put together from what each rank is dealt."""
    sizes = step_sizes(tokens, job.training, job.data)
    micro = micro_batch_sizes(sizes, sharing(tokens, job, dp_size))
    batches = []
    for batch in islice(BucketSampler(streams, sizes, job.training.seed).batches(), 4):
        dealt = [deal(batch.samples, rank, dp_size, micro[batch.bucket]) for rank in range(dp_size)]
        assert len({len(micro_batches) for micro_batches in dealt}) == 1
        if job.parallel.num_chunks > 1:
            assert len(dealt[0]) % job.parallel.pipeline_model_parallel_size == 0
        if budget := job.data.tokens_per_micro_batch:
            assert micro[batch.bucket] in (1, *range(budget // tokens[batch.bucket] + 1))
        samples = tuple(ref for group in zip(*dealt, strict=True) for micro_batch in group for ref in micro_batch)
        batches.append((batch.bucket, batch.consumed_samples, samples))
    return batches


def test_300_layouts_have_the_batches_of_one_process_or_are_refused():
    draw = random.Random(20)
    refused = 0
    for _ in range(300):
        streams, tokens, flags, layout, dp_size = random_case(draw)
        alone = {"micro_batch_size": 1, "pipeline_model_parallel_size": 1, "num_virtual_stages_per_pipeline_rank": None}
        expected = batches_of(job_of(flags, alone), streams, tokens, 1)
        job = job_of(flags, layout)
        try:
            assert batches_of(job, streams, tokens, dp_size) == expected
        except ValueError as error:
            refused += 1
            # The batches really cannot be shared, and what is advised works.
            sizes, cuts = step_sizes(tokens, job.training, job.data), sharing(tokens, job, dp_size)
            assert any(sizes[bucket] % cuts[bucket].unit for bucket in sizes)
            assert all(f"a batch of {b} has {sizes[b]} samples" in str(error) for b in sizes if sizes[b] % cuts[b].unit)
            multiple = int(re.search("multiples of ([0-9]+)", str(error))[1])
            fitting = flags | {"batch_size_multiple": multiple}
            if not flags["tokens_per_batch"]:
                fitting["global_batch_size"] = multiple
            batches_of(job_of(fitting, layout), streams, tokens, dp_size)
            for other in re.findall("[0-9]+", str(error).partition("suit data-parallel size")[2]):
                assert batches_of(job, streams, tokens, int(other)) == expected
    assert 60 < refused < 240


def test_refused_batches_of_a_default_multiple_are_those_of_the_largest_bucket_alone():
    """With batch_size_multiple 0, a layout that shares the largest bucket's batch shares all."""
    draw = random.Random(4)
    for _ in range(50):
        _, tokens, flags, layout, dp_size = random_case(draw)
        job = job_of(
            {"tokens_per_batch": 0, "tokens_per_micro_batch": 0} | {"global_batch_size": 24, "seed": 1}, layout
        )
        cuts = sharing(tokens, job, dp_size)
        if 24 % next(iter(cuts.values())).unit == 0:
            micro_batch_sizes(step_sizes(tokens, job.training, job.data), cuts)
