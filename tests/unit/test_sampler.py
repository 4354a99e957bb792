"""The sampler: a pure function of (seed, consumed_samples), one bucket a batch, every sample as often as it should."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import SampleStream, _round_shares
from megatron_fsvideo.data.sampler import BucketSampler, deal

SMALL, WIDE, STILL = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(1, 32, 32)
SIZES = {SMALL: 4, WIDE: 2, STILL: 12}


def streams(weights=None):
    """Two folders: 30 small and 7 wide clips; 10 small clips and 25 stills."""
    table = [(SMALL, 0, 30), (WIDE, 0, 7), (SMALL, 1, 10), (STILL, 1, 25)]
    shares = _round_shares(weights, [37, 35])
    return [SampleStream(bucket, folder, size, shares[folder] * size) for bucket, folder, size in table]


def take(sampler, count, consumed=0):
    return list(islice(sampler.batches(consumed), count))


def test_any_point_can_be_entered():
    sampler = BucketSampler(streams(), SIZES, seed=3)
    batches = take(sampler, 120)
    assert [batch.consumed_samples for batch in batches] == [
        sum(len(b.samples) for b in batches[:k]) for k in range(120)
    ]
    for k in (0, 1, 17, 40, 77, 119):
        fresh = BucketSampler(streams(), SIZES, seed=3)
        assert take(fresh, 2, batches[k].consumed_samples)[0] == batches[k]
        # A count inside a batch (the batch size was changed) enters at that batch.
        assert next(fresh.batches(batches[k].consumed_samples + 1)) == batches[k]


def test_one_bucket_a_batch_and_its_size():
    sampler = BucketSampler(streams(), SIZES, seed=3)
    for batch in take(sampler, 60):
        assert {sampler.streams[ref.stream_index].bucket for ref in batch.samples} == {batch.bucket}
        assert len(batch.samples) == SIZES[batch.bucket]


def test_each_epoch_has_each_sample_once():
    refs = [ref for batch in take(BucketSampler(streams(), SIZES, seed=3), 400) for ref in batch.samples]
    assert len(refs) == len(set(refs))
    for index, stream in enumerate(streams()):
        for epoch in range(3):
            seen = [ref.position for ref in refs if (ref.stream_index, ref.epoch) == (index, epoch)]
            assert sorted(seen) == list(range(stream.num_samples))
    first, second = ([r.position for r in refs if (r.stream_index, r.epoch) == (0, e)] for e in (0, 1))
    assert first != second != sorted(second)


def test_seeds_differ():
    assert take(BucketSampler(streams(), SIZES, 3), 20) != take(BucketSampler(streams(), SIZES, 4), 20)


def test_weights_are_kept():
    weights = [Fraction(7, 10), Fraction(3, 10)]
    sampler = BucketSampler(streams(weights), SIZES, seed=3)
    refs = [ref for batch in take(sampler, 2000) for ref in batch.samples]
    share = Counter(sampler.streams[ref.stream_index].folder_index for ref in refs)
    assert share[0] / len(refs) == pytest.approx(0.7, abs=0.01)
    # Folders meet in the batches of the bucket they share.
    mixed = [
        b for b in take(sampler, 100) if len({sampler.streams[r.stream_index].folder_index for r in b.samples}) == 2
    ]
    assert len(mixed) > 10


def test_a_batch_larger_than_its_stream_wraps_into_the_next_epoch():
    sampler = BucketSampler([SampleStream(SMALL, 0, 3, Fraction(3))], {SMALL: 8}, seed=0)
    refs = [ref for batch in take(sampler, 9) for ref in batch.samples]
    assert Counter(ref.position for ref in refs) == {0: 24, 1: 24, 2: 24}
    assert next(sampler.batches(64)) == take(sampler, 9)[8]


def test_unshuffled_is_stored_order():
    sampler = BucketSampler([SampleStream(SMALL, 0, 6, Fraction(6))], {SMALL: 2}, seed=0, shuffle=False)
    assert [ref.position for batch in take(sampler, 3) for ref in batch.samples] == list(range(6))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_the_same_list(dp_size):
    samples = take(BucketSampler([SampleStream(SMALL, 0, 64, Fraction(64))], {SMALL: 16}, seed=0), 1)[0].samples
    dealt = [deal(samples, rank, dp_size, 2) for rank in range(dp_size)]
    assert [len(micro_batches) for micro_batches in dealt] == [8 // dp_size] * dp_size
    in_order = [ref for m in range(8 // dp_size) for rank in range(dp_size) for ref in dealt[rank][m]]
    assert tuple(in_order) == samples


def test_uneven_dealing_is_refused():
    with pytest.raises(ValueError, match="batch of 6 samples is not a multiple of data-parallel size 2 x micro_batch"):
        deal(tuple(range(6)), 0, 2, 2)


def test_a_bucket_without_batch_size_is_refused():
    with pytest.raises(ValueError, match="no batch size for bucket 9x32x64"):
        BucketSampler(streams(), {SMALL: 4, STILL: 2}, seed=0)
