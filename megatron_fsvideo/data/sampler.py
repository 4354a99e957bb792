"""Which samples make which global batch: a pure function of (seed, consumed_samples), for exact resume.

A *global* batch holds one bucket, so that shapes are constant within a step. Its ordered list of samples does not
depend on the number of data-parallel ranks; `deal` then shares it out. Nothing is stored but the number of consumed
samples.

How it works. A stream (one folder, one bucket) is an endless row of its samples, shuffled anew for each epoch. Round r
of the blend takes each stream's next `share` samples, mixes the streams of one bucket into that bucket's queue, cuts
the queues into batches (what does not fill a batch waits for the next round: nothing is dropped) and shuffles the
batches. All positions have closed forms, so any round can be entered directly, and shuffles are computed place by place
(bijection.py): memory does not grow with the number of samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from megatron_fsvideo.data.bijection import shuffled_positions
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import SampleStream
from megatron_fsvideo.parallel.seeds import derive_seed

# Batches of a round whose order is computed at once.
_CHUNK = 1024


@dataclass(frozen=True)
class SampleRef:
    """A sample: its stream, its position in the stream's folder, and how often the stream has been through before."""

    stream_index: int
    position: int
    epoch: int


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's samples.

    Attributes:
        consumed_samples: samples consumed before this batch.
    """

    bucket: Bucket
    samples: tuple[SampleRef, ...]
    consumed_samples: int


class BucketSampler:
    """The endless sequence of global batches.

    Args:
        streams: from `LatentDataset.streams`.
        batch_sizes: samples of a global batch of each bucket (`global_batch_sizes` makes them).
        seed: of the shuffles.
        shuffle: False keeps the stored order and interleaves nothing: for validation.
    """

    def __init__(
        self, streams: Sequence[SampleStream], batch_sizes: Mapping[Bucket, int], seed: int, shuffle: bool = True
    ) -> None:
        self.streams = list(streams)
        self.buckets = sorted({stream.bucket for stream in streams})
        if missing := [str(bucket) for bucket in self.buckets if bucket not in batch_sizes]:
            raise ValueError(f"no batch size for bucket {' '.join(missing)}")
        self.batch_sizes = dict(batch_sizes)
        self.seed = seed
        self.shuffle = shuffle

    def batches(self, consumed_samples: int = 0) -> Iterator[GlobalBatch]:
        """Global batches from `consumed_samples` on, without end.

        When `consumed_samples` lies inside a batch, that batch is the first.
        """
        round_index = self._round_of(consumed_samples)
        consumed = self._consumed_before(round_index)
        while True:
            for bucket, batch_index in self._round_batches(round_index):
                size = self.batch_sizes[bucket]
                if consumed + size > consumed_samples:
                    yield GlobalBatch(bucket, self._batch(bucket, batch_index), consumed)
                consumed += size
            round_index += 1

    def _stream_start(self, stream_index: int, round_index: int) -> int:
        """Samples a stream has given before a round."""
        return floor(round_index * self.streams[stream_index].share)

    def _queue_start(self, bucket: Bucket, round_index: int) -> int:
        """Samples a bucket's queue has received before a round."""
        return sum(self._stream_start(k, round_index) for k, s in enumerate(self.streams) if s.bucket == bucket)

    def _batches_before(self, bucket: Bucket, round_index: int) -> int:
        return self._queue_start(bucket, round_index) // self.batch_sizes[bucket]

    def _consumed_before(self, round_index: int) -> int:
        return sum(self._batches_before(bucket, round_index) * self.batch_sizes[bucket] for bucket in self.buckets)

    def _round_of(self, consumed_samples: int) -> int:
        """The round in which a sample count falls: the last that starts at or before it."""
        low, high = 0, 1
        while self._consumed_before(high) <= consumed_samples:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._consumed_before(middle) <= consumed_samples:
                low = middle
            else:
                high = middle
        return low

    def _round_batches(self, round_index: int) -> Iterator[tuple[Bucket, int]]:
        """(bucket, number of the batch in the bucket's queue) of a round, in the order they are used."""
        firsts = [self._batches_before(bucket, round_index) for bucket in self.buckets]
        ends = [self._batches_before(bucket, round_index + 1) for bucket in self.buckets]
        offsets = np.cumsum([0] + [end - first for first, end in zip(firsts, ends, strict=True)])
        total = int(offsets[-1])
        for begin in range(0, total, _CHUNK):
            places = np.arange(begin, min(begin + _CHUNK, total))
            positions = self._shuffled(places, total, "batches", round_index)
            indices = np.searchsorted(offsets, positions, side="right") - 1
            for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
                yield self.buckets[index], firsts[index] + position - int(offsets[index])

    def _batch(self, bucket: Bucket, batch_index: int) -> tuple[SampleRef, ...]:
        size = self.batch_sizes[bucket]
        samples: list[SampleRef] = []
        position = batch_index * size
        round_index = self._queue_round(bucket, position)
        while len(samples) < size:
            begin = position + len(samples) - self._queue_start(bucket, round_index)
            samples += self._queue_samples(bucket, round_index, begin, size - len(samples))
            round_index += 1
        return tuple(samples)

    def _queue_round(self, bucket: Bucket, position: int) -> int:
        """The round that put queue position `position` there."""
        high = 1
        while self._queue_start(bucket, high) <= position:
            high *= 2
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            if self._queue_start(bucket, middle) <= position:
                low = middle
            else:
                high = middle
        return low

    def _queue_samples(self, bucket: Bucket, round_index: int, begin: int, count: int) -> list[SampleRef]:
        """`count` samples, or as many as there are, from place `begin` on of what a round adds to a bucket's queue."""
        members = [k for k, stream in enumerate(self.streams) if stream.bucket == bucket]
        starts = [self._stream_start(k, round_index) for k in members]
        ends = [self._stream_start(k, round_index + 1) for k in members]
        offsets = np.cumsum([0] + [end - start for start, end in zip(starts, ends, strict=True)])
        total = int(offsets[-1])
        # The streams are in shuffled order already; this mixes the streams of one bucket.
        places = np.arange(begin, min(begin + count, total))
        positions = self._shuffled(places, total, "queue", str(bucket), round_index)
        owners = np.searchsorted(offsets, positions, side="right") - 1
        samples: dict[int, SampleRef] = {}
        for owner, (stream_index, start) in enumerate(zip(members, starts, strict=True)):
            (mine,) = np.nonzero(owners == owner)
            found = self._stream_samples(stream_index, start + positions[mine] - offsets[owner])
            samples.update(zip(mine.tolist(), found, strict=True))
        return [samples[place] for place in range(len(samples))]

    def _stream_samples(self, stream_index: int, numbers: np.ndarray) -> list[SampleRef]:
        """The samples that a stream gives as numbers `numbers` of its endless row."""
        stream = self.streams[stream_index]
        epochs, places = np.divmod(numbers, stream.num_samples)
        positions = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            role = ("epoch", stream.folder_index, str(stream.bucket), epoch)
            positions[epochs == epoch] = self._shuffled(places[epochs == epoch], stream.num_samples, *role)
        pairs = zip(positions.tolist(), epochs.tolist(), strict=True)
        return [SampleRef(stream_index, position, epoch) for position, epoch in pairs]

    def _shuffled(self, places: np.ndarray, size: int, *role: int | str) -> np.ndarray:
        """Positions at these places of the shuffle chosen by (seed, role); without a shuffle, the places themselves."""
        return shuffled_positions(places, size, derive_seed(self.seed, *role)) if self.shuffle else places


def deal(
    samples: Sequence[SampleRef], dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[tuple[SampleRef, ...]]:
    """One data-parallel rank's micro-batches of a global batch.

    The batch is cut into micro-batches in order and these are dealt round: micro-batch m of rank r is number
    m * dp_size + r, so the union over ranks is the same list for any number of ranks.

    Raises:
        ValueError: the ranks cannot share the batch evenly.
    """
    if len(samples) % (dp_size * micro_batch_size):
        raise ValueError(
            f"a global batch of {len(samples)} samples is not a multiple of data-parallel size {dp_size} x "
            f"micro_batch_size {micro_batch_size} = {dp_size * micro_batch_size}"
        )
    micro_batches = [tuple(samples[k : k + micro_batch_size]) for k in range(0, len(samples), micro_batch_size)]
    return micro_batches[dp_rank::dp_size]
