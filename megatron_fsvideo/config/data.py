"""What a job reads: videos for the autoencoder, latent datasets for the DiT."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """latent datasets made by tools/preprocess_latents.py"""

    data_path: tuple[str, ...] = ()
    """Latent dataset folders; several blend by weight: 0.7 videos/ 0.3 images/."""
    valid_data_path: tuple[str, ...] = ()
    """Latent dataset folders for validation, spelled like data_path."""
    bucket_frames: tuple[int, ...] = ()
    """Take only samples of these numbers of frames (1 for images), in validation too; none takes all."""
    bucket_resolution: int | None = None
    """Take only samples whose area is within a quarter of this side's square: 256 takes 256x256 and 192x320."""
    sample_list: str | None = None
    """File of the samples to train on, one a line, its first word the key (tools/list_samples.py prints them)."""
    tokens_per_batch: int = 0
    """Tokens of an optimizer step over all ranks, from which each bucket's batch size follows; 0 takes those of
    global_batch_size samples of the largest bucket."""
    tokens_per_micro_batch: int = 0
    """Tokens of a micro-batch, from which each bucket's micro-batch size follows (as many samples as fit, at least
    one); 0 takes micro_batch_size for all buckets."""
    num_workers: int = 0
    """Threads that read ahead; 0 reads when a batch is asked for."""
    max_bad_fraction: float = 0.01
    """A larger share of unreadable samples stops the run; below it they are skipped and named."""

    def __post_init__(self) -> None:
        if min(self.tokens_per_batch, self.tokens_per_micro_batch) < 0:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} and tokens_per_micro_batch {self.tokens_per_micro_batch} "
                "cannot be negative"
            )


@dataclass(frozen=True)
class VideoDataConfig:
    """video files for the autoencoder"""

    video_dir: str | None = None
    """Folder of video files (searched recursively)."""
    num_frames: int = 17
    """Frames per training clip, 4k+1."""
    resolution: int = 256
    """Side of the square training crops, in pixels."""
    short_side: int = 256
    """Videos are resized to this short side before cropping."""
    max_frame_stride: int = 1
    """Training clips skip frames: every frame, every second, ... up to this stride, drawn for each clip."""
    buckets: tuple[str, ...] = ()
    """Clip shapes, frames x height x width as in 17x192x320, instead of num_frames and square crops: a batch has one
    shape, and a video serves those of each length that are nearest to its aspect ratio. A shape named twice is drawn
    twice as often."""
    holdout_every: int = 0
    """Every n-th shot of each video is held out for validation; 0 holds out none."""
    valid_resolution: int | None = None
    """Side of the square centre crops of held-out clips, in pixels; none takes resolution."""
    cache_gib: float = 4.0
    """Memory (GiB) for decoded videos; those that do not fit are decoded again for each clip."""

    def __post_init__(self) -> None:
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames must be 4k+1 (1, 5, 9, 13, 17, ...), got {self.num_frames}; "
                f"try {self.num_frames // 4 * 4 + 1}"
            )
        if self.short_side < self.resolution:
            raise ValueError(f"short_side {self.short_side} is smaller than resolution {self.resolution}")
        if self.valid_side > self.short_side:
            raise ValueError(f"short_side {self.short_side} is smaller than valid_resolution {self.valid_side}")
        if self.max_frame_stride < 1:
            raise ValueError(f"max_frame_stride must be at least 1, got {self.max_frame_stride}")

    @property
    def valid_side(self) -> int:
        """Side of held-out clips."""
        return self.resolution if self.valid_resolution is None else self.valid_resolution
