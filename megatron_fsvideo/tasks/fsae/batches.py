"""The clips of an autoencoder's step: images or videos, crops or buckets. They depend only on the step's number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import getsize, relpath
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEJob
from megatron_fsvideo.data.batch_sizes import Sharing, global_batch_sizes, micro_batch_sizes
from megatron_fsvideo.data.bucketed_clips import BucketedClips, open_bucketed_clips
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clip_dataset import ClipDataset, open_clips
from megatron_fsvideo.data.read_ahead import ReadAhead
from megatron_fsvideo.data.sample_order import list_record, order_record
from megatron_fsvideo.models.fsae.frame_shards import MIN_LATENTS
from megatron_fsvideo.models.fsae.patch import cell_size
from megatron_fsvideo.parallel.seeds import sample_generator


@dataclass(frozen=True)
class BatchPlan:
    """The batch of one step.

    Attributes:
        num_samples: number of samples over all ranks.
        micro_batch_size: samples of one forward pass.
        bucket: shape of the clips.
        is_shared: whether the ranks of a context-parallel group share the frames of each clip; if not, each rank gets
            whole clips.
    """

    num_samples: int
    micro_batch_size: int
    bucket: Bucket
    is_shared: bool = False

    def part(self, consumed_samples: int, rank: int, num_ranks: int) -> range:
        """The numbers of the samples of one of `num_ranks` equal parts, in a step after `consumed_samples`."""
        size = self.num_samples // num_ranks
        return range(consumed_samples + rank * size, consumed_samples + (rank + 1) * size)


class FSAEBatches:
    """Plans and reads the batches of an autoencoder job.

    Attributes:
        batch_sizes: number of samples of a step, by bucket of videos; empty without buckets.
        valid_clips: held-out clips [n, 3, f, h, w], or None when the job does not validate.

    Raises:
        ValueError: ranks cannot share the batches, the autoencoder cannot divide a bucket, there are no videos, or none
            are held out although `eval_iters` is positive.

    Args:
        dp_size, cp_size: number of data-parallel groups, and of ranks that share a clip's frames.
    """

    def __init__(self, job: FSAEJob, dp_size: int, cp_size: int = 1) -> None:
        self.job = job
        self.dp_size = dp_size
        self.cp_size = cp_size
        self._check_batches()
        self._clips, held_out = self._open()
        self._bucketed = self._clips if isinstance(self._clips, BucketedClips) else None
        self._ahead = ReadAhead(self._clip, job.data.num_workers)
        self.batch_sizes: dict[Bucket, int] = {}
        self._micro_batch_sizes: dict[Bucket, int] = {}
        if self._bucketed is not None:
            self._size_batches([bucket for bucket in self._bucketed.buckets if bucket.num_frames > 1])
        self.valid_clips: Tensor | None = None
        if job.training.eval_iters > 0:
            if held_out is None:
                raise ValueError("eval_iters is positive, but no shot is held out: set holdout_every")
            count = job.training.eval_iters * job.training.global_batch_size
            self.valid_clips = held_out.fixed_clips(count, job.data.num_frames, job.data.valid_side)

    def sample_order(self) -> dict[str, Any]:
        """Settings that decide which clips a batch holds, for the checkpoint's record."""
        training, phase = self.job.training, self.job.phase
        settings: dict[str, Any] = {"seed": training.seed, "buckets": list(self.job.data.buckets)}
        settings |= {f"the batch of {bucket}": size for bucket, size in self.batch_sizes.items()} or {
            "global_batch_size": training.global_batch_size
        }
        if phase.image_fraction or phase.image_warmup_iters:
            settings["image_batch_size"] = phase.image_batch_size
        sizes = {path: getsize(path) for path in {shot.path for shot in self._clips.shots}}
        lines = (
            f"{relpath(shot.path, self.job.data.video_dir)} {sizes[shot.path]} {shot.start} {shot.num_frames}"
            for shot in self._clips.shots
        )
        return order_record("clips drawn at random", settings, [list_record("the shots of video_dir", lines)])

    def summary(self) -> list[str]:
        """Lines for the user: shots, shapes and batches."""
        training, data, phase = self.job.training, self.job.data, self.job.phase
        shots = f"{len(self._clips.shots):,} shots of {len({shot.path for shot in self._clips.shots}):,} files"
        whole = Bucket(data.num_frames, data.resolution, data.resolution)
        sizes = self.batch_sizes or {whole: training.global_batch_size}
        serving = {} if self._bucketed is None else {b: f" ({self._bucketed.num_shots(b):,} shots)" for b in sizes}
        batches = [f"{size:,} of {bucket}{serving.get(bucket, '')}" for bucket, size in sorted(sizes.items())]
        if phase.image_fraction or phase.image_warmup_iters:
            batches.append(f"{phase.image_batch_size:,} images")
        lines = [f"data: {shots} in {data.video_dir}; batches of {', '.join(batches)}"]
        return lines + ([] if self.valid_clips is None else [f"validation: {len(self.valid_clips):,} held-out clips"])

    def plan(self, iteration: int) -> BatchPlan:
        """The batch of the step after `iteration` steps."""
        training, data = self.job.training, self.job.data
        is_image = self._is_image(iteration)
        if self._bucketed is None:
            bucket = Bucket(1 if is_image else data.num_frames, data.resolution, data.resolution)
        else:
            bucket = self._bucketed.choose_bucket(iteration, is_image)
        if is_image:
            size = self.job.phase.image_batch_size
            return BatchPlan(size, size // (self.dp_size * self.cp_size), bucket)
        is_shared = self._is_shared(bucket)
        if self._bucketed is None:
            return BatchPlan(training.global_batch_size, training.micro_batch_size, bucket, is_shared)
        return BatchPlan(self.batch_sizes[bucket], self._micro_batch_sizes[bucket], bucket, is_shared)

    def read(self, first: int, plan: BatchPlan) -> Tensor:
        """Read the micro-batch that begins with sample `first`: [micro_batch_size, 3, f, h, w] in [-1, 1]."""
        return torch.stack([self._ahead.take((first + k, plan.bucket)) for k in range(plan.micro_batch_size)])

    def expect(self, iteration: int, consumed_samples: int, place: Callable[[BatchPlan], tuple[int, int]]) -> None:
        """Let `num_workers` threads read this rank's clips of the step after `iteration` steps, and of the next step.

        Args:
            place: plan -> this rank's number, and the number of ranks, among those that share the batch.
        """
        keys: list[tuple[int, Bucket]] = []
        for number in (iteration, iteration + 1):
            plan = self.plan(number)
            keys += [(sample, plan.bucket) for sample in plan.part(consumed_samples, *place(plan))]
            consumed_samples += plan.num_samples
        self._ahead.expect(keys)

    def _clip(self, key: tuple[int, Bucket]) -> Tensor:
        number, bucket = key
        if isinstance(self._clips, BucketedClips):
            return self._clips.random_clip(number, bucket)
        return self._clips.random_clip(number, bucket.num_frames, bucket.height)

    def _size_batches(self, buckets: Sequence[Bucket]) -> None:
        """Batch sizes by bucket: the job's sizes for the largest bucket, larger ones for smaller clips."""
        training = self.job.training
        self.batch_sizes = global_batch_sizes(
            {bucket: self._cost(bucket) for bucket in buckets},
            training.global_batch_size,
            training.batch_size_multiple,
        )
        most = max(map(self._work, buckets))
        sharing = {
            bucket: Sharing(
                self.dp_size,
                max(1, round(training.micro_batch_size * most / self._work(bucket))),
                may_shrink=True,
                num_parts=1 if self._is_shared(bucket) else self.cp_size,
                parts_name="context-parallel size",
            )
            for bucket in buckets
        }
        self._micro_batch_sizes = micro_batch_sizes(self.batch_sizes, sharing)

    def _is_shared(self, bucket: Bucket) -> bool:
        """Whether a clip is long enough for the ranks of a context-parallel group."""
        return 1 < self.cp_size <= self.job.model.compression.latent_frames(bucket.num_frames) // MIN_LATENTS

    def _work(self, bucket: Bucket) -> float:
        """Number of pixels of one clip that one rank's decoder makes. It limits the number of clips in memory."""
        return self._decoded(bucket) / (self.cp_size if self._is_shared(bucket) else 1)

    def _decoded(self, bucket: Bucket) -> int:
        """Number of pixels of one clip that the decoder makes: those of its patch."""
        memory, cell = self.job.memory, cell_size(self.job.model)
        height = min(bucket.height, cell * memory.patch_rows or bucket.height)
        width = min(bucket.width, cell * memory.patch_columns or bucket.width)
        return bucket.num_frames * height * width

    def _cost(self, bucket: Bucket) -> int:
        """Number of pixels of one clip that pass through the networks in training; a backward pass counts twice.

        The encoder sees the whole clip, the decoder a patch. If only the clip's pixels counted, a step on short or
        small clips would decode as many of their patches as fit into one large clip, which is many times the work.
        """
        memory = self.job.memory
        learns_whole = self.job.phase.trains_encoder and not memory.encoder_tile
        return bucket.num_pixels * (3 if learns_whole else 1) + 3 * self._decoded(bucket)

    def _is_image(self, iteration: int) -> bool:
        phase = self.job.phase
        if iteration < phase.image_warmup_iters:
            return True
        if phase.image_fraction == 0:
            return False
        generator = sample_generator(self.job.training.seed, iteration, 0, "image_batch")
        return float(torch.rand((), generator=generator)) < phase.image_fraction

    def _open(self) -> tuple[ClipDataset | BucketedClips, ClipDataset | None]:
        data, seed = self.job.data, self.job.training.seed
        if not data.buckets:
            return open_clips(data, seed)
        buckets = [Bucket.parse(text) for text in data.buckets]
        for bucket in buckets:
            bucket.check_factors(self.job.model.spatial_factor, self.job.model.temporal_factor)
        bucketed, held_out = open_bucketed_clips(data, buckets, seed)
        for is_image in {self.job.phase.image_fraction > 0 or self.job.phase.image_warmup_iters > 0, False}:
            bucketed.choose_bucket(0, is_image)  # refuse it now rather than at the first such batch
        return bucketed, held_out

    def _check_batches(self) -> None:
        training, data, dp_size = self.job.training, self.job.data, self.dp_size
        if training.train_iters <= self.job.phase.image_warmup_iters:
            raise ValueError(
                f"train_iters {training.train_iters} ends within the image_warmup_iters "
                f"{self.job.phase.image_warmup_iters}, on single frames alone: set image_warmup_iters to less, or to 0"
            )
        if training.global_batch_size % (training.micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x {dp_size} processes = {training.micro_batch_size * dp_size}"
            )
        num_ranks = dp_size * self.cp_size
        if self.job.phase.image_batch_size % num_ranks:
            below = self.job.phase.image_batch_size // num_ranks * num_ranks
            raise ValueError(
                f"image_batch_size {self.job.phase.image_batch_size} is not a multiple of the {num_ranks} processes; "
                f"nearest: {f'{below} or ' if below else ''}{below + num_ranks}"
            )
        if self.cp_size > 1 and not data.buckets and not self._is_shared(Bucket(data.num_frames, 1, 1)):
            raise ValueError(
                f"clips of {data.num_frames} frames cannot be shared by context_parallel_size {self.cp_size}, which "
                f"needs at least {self.job.model.compression.video_frames(MIN_LATENTS * self.cp_size)}"
            )
