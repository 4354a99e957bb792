"""Where the DiT's training step gets its batches: each data-parallel rank's share, on every rank of its model."""

import time
from collections.abc import Iterator

from megatron_fsvideo.config import DataConfig, DiTConfig, DiTParallelConfig, TrainingConfig, check_token_count
from megatron_fsvideo.data.batch import Batch, BatchLoader, broadcast_batch
from megatron_fsvideo.data.latent_dataset import LatentDataset, SampleFilter, read_sample_list
from megatron_fsvideo.data.latent_shards import sample_id
from megatron_fsvideo.data.sampler import BucketSampler, GlobalBatch, bucket_sizes
from megatron_fsvideo.parallel.groups import ProcessGroups


class BatchSource:
    """Global batches in order, from a number of consumed samples on.

    Tensor-parallel rank 0 reads and sends to its group; every pipeline stage and context-parallel rank reads the same
    samples for itself.

    Attributes:
        sizes: of each bucket's batches.

    Args:
        shuffle: False for validation: stored order.
        microbatch_multiple: a rank's micro-batches of one step are a multiple of it.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        model: DiTConfig,
        training: TrainingConfig,
        data: DataConfig,
        pgs: ProcessGroups,
        *,
        consumed_samples: int = 0,
        shuffle: bool = True,
        microbatch_multiple: int = 1,
    ) -> None:
        self.data_wait = 0.0
        self._pgs = pgs
        self._dataset = dataset
        self._plan: GlobalBatch | None = None
        self._tokens = dataset.bucket_tokens(model.patch_size)
        multiple = training.micro_batch_size * pgs.dp_size * microbatch_multiple
        if training.global_batch_size % multiple and not data.tokens_per_batch:
            stages = f" x pipeline size {microbatch_multiple} (virtual stages)" if microbatch_multiple > 1 else ""
            raise ValueError(
                f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x data-parallel size {pgs.dp_size}{stages} = {multiple}"
            )
        self.sizes = bucket_sizes(
            self._tokens,
            training.micro_batch_size,
            training.global_batch_size,
            pgs.dp_size * microbatch_multiple,
            tokens_per_micro_batch=data.tokens_per_micro_batch,
            tokens_per_batch=data.tokens_per_batch,
        )
        batch_sizes = {bucket: size.batch for bucket, size in self.sizes.items()}
        sampler = BucketSampler(dataset.streams, batch_sizes, training.seed, shuffle)
        self._plans = sampler.batches(consumed_samples)
        self._loader: Iterator[tuple[GlobalBatch, list[Batch]]] | None = None
        if pgs.tp_rank == 0:
            self._loader = BatchLoader(
                dataset,
                sampler,
                dp_rank=pgs.dp_rank,
                dp_size=pgs.dp_size,
                micro_batch_sizes={bucket: size.micro_batch for bucket, size in self.sizes.items()},
                consumed_samples=consumed_samples,
                num_workers=data.num_workers,
            )
        self._num_microbatches = {
            bucket: size.batch // (size.micro_batch * pgs.dp_size) for bucket, size in self.sizes.items()
        }

    def next(self) -> tuple[list[Batch], int, int]:
        """This rank's micro-batches in host memory, the global batch's number of samples, the tokens of one sample."""
        started = time.perf_counter()
        plan = self._plan = next(self._plans)
        batches: list[Batch | None] = [None] * self._num_microbatches[plan.bucket]
        if self._loader is not None:
            batches = list(next(self._loader)[1])
        received = [broadcast_batch(batch, self._pgs) for batch in batches]
        self.data_wait = time.perf_counter() - started
        return received, len(plan.samples), self._tokens[plan.bucket]

    def sample_names(self) -> dict[int, str]:
        """Sample id -> name, for messages, of the whole global batch that `next` gave last."""
        assert self._plan is not None, "next was called"
        refs = self._plan.samples
        keys = [self._dataset.sample_key(ref.stream_index, ref.position) for ref in refs]
        return {sample_id(key): key for key in keys}


def training_filter(data: DataConfig) -> SampleFilter:
    """Which samples of the training data are used.

    Raises:
        ValueError: `sample_list` is no file, or names nothing.
    """
    keys = None if data.sample_list is None else read_sample_list(data.sample_list)
    return SampleFilter(data.bucket_frames, data.bucket_resolution, keys)


def validation_filter(data: DataConfig) -> SampleFilter:
    """The same for validation, which takes the shapes of training, but every sample."""
    return SampleFilter(data.bucket_frames, data.bucket_resolution)


def check_data_fits_model(dataset: LatentDataset, model: DiTConfig, parallel: DiTParallelConfig) -> None:
    """Refuse a dataset whose sizes are not the model's, or whose tokens the ranks cannot share.

    Raises:
        ValueError: naming the flag and both numbers.
    """
    for name, has, wants in (
        ("latent_channels", dataset.latent_channels, model.latent_channels),
        ("text_embed_dim", dataset.text_embed_dim, model.text_embed_dim),
        ("image_embed_dim", dataset.image_embed_dim, model.image_embed_dim),
    ):
        if wants != has and not (wants == 0 and name != "latent_channels"):
            raise ValueError(f"{name} of the model is {wants}, of the dataset {dataset.folders[0]} {has}")
    for bucket, num_tokens in dataset.bucket_tokens(model.patch_size).items():
        check_token_count(num_tokens, f"bucket {bucket} of {dataset.folders[0]}", parallel)
