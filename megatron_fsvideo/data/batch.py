"""A micro-batch: the tensors the training step receives, and how they reach a tensor-parallel group.

Dimension letters: b samples, c latent channels, t h w latent frames, rows, columns, l text rows, n image rows,
e embedding width.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import LatentSample, sample_id
from megatron_fsvideo.data.sampler import BucketSampler, GlobalBatch, SampleRef, deal
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.parallel.groups import ProcessGroups, broadcast_object


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        sample_ids: int64 [b]; a sample's randomness is drawn from its id and epoch.
        epochs: int64 [b]: how often the sample has been seen before.
        latents: fp32 [b, c, t, h, w], normalised per channel with the dataset's mean and std.
        text: fp32 [b, l, e], zero rows after each caption's own; [b, l, 0] without text encoder.
        text_lengths: int64 [b]: rows that are the caption's own.
        image: fp32 [b, n, e], or None without image encoder.
        captions: the b texts.
    """

    sample_ids: torch.Tensor
    epochs: torch.Tensor
    latents: torch.Tensor
    text: torch.Tensor
    text_lengths: torch.Tensor
    image: torch.Tensor | None
    captions: list[str]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with all tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def collate(
    samples: Sequence[LatentSample],
    epochs: Sequence[int],
    scale: LatentScale,
    text_length: int,
) -> Batch:
    """Make a batch of samples of one bucket.

    Args:
        epochs: of each sample.
        scale: of the latents that the model knows.
        text_length: rows to pad (with zeros) the text to.
    """
    latents = torch.stack([sample.latents.float() for sample in samples])  # [b, c, t, h, w]
    text = torch.zeros(len(samples), text_length, samples[0].text.shape[1])  # [b, l, e]
    for row, sample in zip(text, samples, strict=True):
        row[: len(sample.text)] = sample.text.float()
    image = torch.stack([sample.image.float() for sample in samples])  # [b, n, e]
    return Batch(
        sample_ids=torch.tensor([sample_id(sample.key) for sample in samples], dtype=torch.int64),
        epochs=torch.tensor(list(epochs), dtype=torch.int64),
        latents=scale.normalize(latents),
        text=text,
        text_lengths=torch.tensor([len(sample.text) for sample in samples], dtype=torch.int64),
        image=image if image.shape[2] else None,
        captions=[sample.record["caption"] for sample in samples],
    )


def read_batch(dataset: LatentDataset, refs: Sequence[SampleRef]) -> Batch:
    """Read and collate the samples of one micro-batch."""
    samples = [dataset.read(ref.stream_index, ref.position) for ref in refs]
    return collate(samples, [ref.epoch for ref in refs], dataset.scale, dataset.text_length)


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
        self._ahead: list[tuple[GlobalBatch, list[Future[Batch]]]] = []
        self._depth = num_workers

    def __iter__(self) -> Iterator[tuple[GlobalBatch, list[Batch]]]:
        return self

    def __next__(self) -> tuple[GlobalBatch, list[Batch]]:
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


def broadcast_batch(batch: Batch | None, pgs: ProcessGroups) -> Batch:
    """Give every rank of a tensor-parallel group the batch that its rank 0 read (the others pass None).

    It stays in host memory: a step's micro-batches together may be larger than what a GPU has left.
    """
    if pgs.tp_size > 1:
        batch = broadcast_object(batch, pgs.tp)
    assert batch is not None, "tensor-parallel rank 0 has the batch to send"
    return batch
