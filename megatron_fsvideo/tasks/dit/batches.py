"""The batches of the DiT's training step: each data-parallel rank's share, on every rank of its model."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from megatron_fsvideo.config import DataConfig, DiTConfig, DiTJob, DiTParallelConfig, TrainingConfig, check_token_count
from megatron_fsvideo.data.batch_loader import BatchLoader
from megatron_fsvideo.data.batch_sizes import Sharing, global_batch_sizes, micro_batch_sizes
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import LatentDataset, SampleFilter, read_sample_list
from megatron_fsvideo.data.latent_shards import sample_id
from megatron_fsvideo.data.sample_order import order_record
from megatron_fsvideo.data.sampler import BucketSampler, GlobalBatch
from megatron_fsvideo.data.stored_batch import StoredBatch, broadcast_batch
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.parallel.groups import ProcessGroups


class BatchSource:
    """Reads global batches in order, starting after a number of consumed samples.

    Tensor-parallel rank 0 reads and sends to its group; every pipeline stage and context-parallel rank reads the same
    samples for itself. With `num_workers`, a thread fetches the next step's batches while this step is computed.

    Args:
        shuffle: False for validation: stored order.

    Raises:
        ValueError: the layout cannot share the batches.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        job: DiTJob,
        pgs: ProcessGroups,
        *,
        consumed_samples: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.data_wait = 0.0
        self._pgs = pgs
        self._dataset = dataset
        self._plan: GlobalBatch | None = None
        self._tokens = dataset.bucket_tokens(job.model.patch_size)
        batch_sizes = step_sizes(self._tokens, job.training, job.data)
        sizes = micro_batch_sizes(batch_sizes, sharing(self._tokens, job, pgs.dp_size))
        sampler = BucketSampler(dataset.streams, batch_sizes, job.training.seed, shuffle)
        self._plans = sampler.batches(consumed_samples)
        self._loader: BatchLoader | None = None
        if pgs.tp_rank == 0:
            self._loader = BatchLoader(
                dataset,
                sampler,
                dp_rank=pgs.dp_rank,
                dp_size=pgs.dp_size,
                micro_batch_sizes=sizes,
                consumed_samples=consumed_samples,
                num_workers=job.data.num_workers,
            )
        self._micro_batch_sizes = sizes
        self._is_ahead = job.data.num_workers > 0
        self._next: Future[tuple[GlobalBatch, list[StoredBatch]]] | None = None

    def next(self) -> tuple[list[StoredBatch], int, int]:
        """Return this rank's micro-batches in host memory, the global batch size, and the tokens of one sample."""
        started = time.perf_counter()
        thread = self._pgs.tp_host_thread
        plan, batches = (self._next or thread.submit(self._fetch)).result()
        self._next = thread.submit(self._fetch) if self._is_ahead else None
        self._plan = plan
        self.data_wait = time.perf_counter() - started
        return batches, len(plan.samples), self._tokens[plan.bucket]

    def close(self) -> None:
        """Wait for the batch being fetched, as the group's other tensor-parallel ranks do, and stop the readers."""
        if self._next is not None:
            self._next.result()
        if self._loader is not None:
            self._loader.close()

    def _fetch(self) -> tuple[GlobalBatch, list[StoredBatch]]:
        plan = next(self._plans)
        size = self._micro_batch_sizes[plan.bucket]
        batches: list[StoredBatch | None] = [None] * (len(plan.samples) // (size * self._pgs.dp_size))
        if self._loader is not None:
            batches = list(next(self._loader)[1])
        scale, text_length = self._dataset.scale, self._dataset.text_length
        return plan, [broadcast_batch(batch, size, scale, text_length, self._pgs) for batch in batches]

    def sample_names(self) -> dict[int, str]:
        """Map sample ids to names, for messages, for the global batch that `next` returned last."""
        assert self._plan is not None, "next was called"
        refs = self._plan.samples
        keys = [self._dataset.sample_key(ref.stream_index, ref.position) for ref in refs]
        return {sample_id(key): key for key in keys}


def step_sizes(tokens: Mapping[Bucket, int], training: TrainingConfig, data: DataConfig) -> dict[Bucket, int]:
    """Number of samples of an optimizer step, by bucket; equal for all layouts.

    Args:
        tokens: tokens of one sample, by bucket.
    """
    return global_batch_sizes(tokens, training.global_batch_size, training.batch_size_multiple, data.tokens_per_batch)


def describe_batches(name: str, dataset: LatentDataset, job: DiTJob) -> str:
    """One line for the user: folders, and samples and batch size of each bucket."""
    counts: dict[Bucket, int] = {}
    for stream in dataset.streams:
        counts[stream.bucket] = counts.get(stream.bucket, 0) + stream.num_samples
    sizes = step_sizes(dataset.bucket_tokens(job.model.patch_size), job.training, job.data)
    parts = [f"{counts[bucket]:,} of {bucket} (batches of {sizes[bucket]:,})" for bucket in sorted(counts)]
    return f"{name}: {len(dataset):,} samples in {' '.join(map(str, dataset.folders))}: {', '.join(parts)}"


def sample_order(dataset: LatentDataset, job: DiTJob) -> dict[str, Any]:
    """Settings that decide which samples a batch holds, for the checkpoint's record."""
    sizes = step_sizes(dataset.bucket_tokens(job.model.patch_size), job.training, job.data)
    settings = {"seed": job.training.seed} | {f"the batch of {bucket}": size for bucket, size in sizes.items()}
    return order_record("the computed shuffle", settings, dataset.list_records)


def sharing(tokens: Mapping[Bucket, int], job: DiTJob, dp_size: int) -> dict[Bucket, Sharing]:
    """How `dp_size` data-parallel ranks divide the batches of each bucket.

    Args:
        tokens: tokens of one sample, by bucket.
    """
    budget, parallel = job.data.tokens_per_micro_batch, job.parallel
    # With virtual stages, Megatron's schedule takes micro-batches in groups of the pipeline's size.
    num_parts = parallel.pipeline_model_parallel_size if parallel.num_chunks > 1 else 1
    return {
        bucket: Sharing(
            dp_size,
            max(1, budget // count) if budget else job.training.micro_batch_size,
            may_shrink=budget > 0,
            num_parts=num_parts,
            parts_name="pipeline size (virtual stages)",
        )
        for bucket, count in tokens.items()
    }


def open_training_data(job: DiTJob, dp_size: int) -> LatentDataset:
    """The samples that a job trains on.

    Raises:
        ValueError: no dataset, or one that does not fit the model or the layout; `sample_list` is not a file, or
            names no sample.
    """
    keys = None if job.data.sample_list is None else read_sample_list(job.data.sample_list)
    return _open(job.data.data_path, keys, None, job, dp_size)


def open_validation_data(job: DiTJob, dp_size: int, scale: LatentScale) -> LatentDataset | None:
    """All validation samples of the shapes of training, or None when the job does not validate.

    Args:
        scale: that of the training data, which normalises these latents too.

    Raises:
        ValueError: no dataset, or one that does not fit the model or the layout.
    """
    if job.training.eval_iters == 0:
        return None
    if not job.data.valid_data_path:
        raise ValueError("eval_iters is positive, but valid_data_path names no dataset")
    return _open(job.data.valid_data_path, None, scale, job, dp_size)


def check_data_fits_model(dataset: LatentDataset, model: DiTConfig, parallel: DiTParallelConfig) -> None:
    """Refuse a dataset whose sizes are not the model's, or whose tokens the ranks cannot share.

    Raises:
        ValueError: they do not fit; the message has the flag and both numbers.
    """
    for name, has, wants in (
        ("latent_channels", dataset.latent_channels, model.latent_channels),
        ("text_embed_dim", dataset.text_embed_dim, model.text_embed_dim),
        ("image_embed_dim", dataset.image_embed_dim, model.image_embed_dim),
    ):
        if wants != has and not (wants == 0 and name != "latent_channels"):
            flag = f"--{name.replace('_', '-')} {has}"
            raise ValueError(f"{name} of the model is {wants}, of the dataset {dataset.folders[0]} {has}: give {flag}")
    for bucket, num_tokens in dataset.bucket_tokens(model.patch_size).items():
        check_token_count(num_tokens, f"bucket {bucket} of {dataset.folders[0]}", parallel)


def _open(
    data_path: tuple[str, ...], keys: frozenset[str] | None, scale: LatentScale | None, job: DiTJob, dp_size: int
) -> LatentDataset:
    data = job.data
    sample_filter = SampleFilter(data.bucket_frames, data.bucket_resolution, keys)
    dataset = LatentDataset(data_path, data.max_bad_fraction, scale, sample_filter)
    check_data_fits_model(dataset, job.model, job.parallel)
    tokens = dataset.bucket_tokens(job.model.patch_size)
    # Refused now rather than when the first batch is read.
    micro_batch_sizes(step_sizes(tokens, job.training, job.data), sharing(tokens, job, dp_size))
    return dataset
