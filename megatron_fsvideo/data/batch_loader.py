"""The row of micro-batches that one data-parallel rank trains on, read ahead by threads."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.sampler import BucketSampler, GlobalBatch, SampleRef, deal
from megatron_fsvideo.data.stored_batch import StoredBatch, read_batch


class BatchLoader:
    """Iterator over optimizer steps: (global batch, this rank's micro-batches), read ahead by threads.

    Args:
        dp_rank, dp_size: place in the data-parallel group.
        micro_batch_sizes: samples of a micro-batch of each bucket.
        consumed_samples: where to start.
        num_workers: threads that read ahead (reading is file access, which does not hold the interpreter); 0 reads
            when asked.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        sampler: BucketSampler,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_sizes: Mapping[Bucket, int],
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self._dp_rank, self._dp_size, self._micro_batch_sizes = dp_rank, dp_size, micro_batch_sizes
        self._plans = sampler.batches(consumed_samples)
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        self._ahead: list[tuple[GlobalBatch, list[Future[StoredBatch]]]] = []
        self._depth = num_workers

    def __iter__(self) -> Iterator[tuple[GlobalBatch, list[StoredBatch]]]:
        return self

    def __next__(self) -> tuple[GlobalBatch, list[StoredBatch]]:
        if self._pool is None:
            plan = next(self._plans)
            return plan, [read_batch(self.dataset, refs) for refs in self._deal(plan)]
        for plan in islice(self._plans, 1 + self._depth - len(self._ahead)):
            reads = [self._pool.submit(read_batch, self.dataset, refs) for refs in self._deal(plan)]
            self._ahead.append((plan, reads))
        plan, reads = self._ahead.pop(0)
        return plan, [read.result() for read in reads]

    def _deal(self, plan: GlobalBatch) -> list[tuple[SampleRef, ...]]:
        return deal(plan.samples, self._dp_rank, self._dp_size, self._micro_batch_sizes[plan.bucket])

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
