"""The data of a job: videos for the autoencoder, latent datasets for the DiT."""

from dataclasses import dataclass

from megatron_fsvideo.config.rules import Checked, Count, NonNegative, PathText, PositiveInt, Share


@dataclass(frozen=True)
class DataConfig(Checked):
    """latent datasets made by tools/preprocess_latents.py"""

    data_path: tuple[PathText, ...] = ()
    """Latent dataset folders. To blend several, put a weight before each: 0.7 videos/ 0.3 images/."""
    valid_data_path: tuple[PathText, ...] = ()
    """Latent dataset folders for validation, spelled like --data-path."""
    bucket_frames: tuple[PositiveInt, ...] = ()
    """Train and validate only on samples with these numbers of frames (1 for images). None takes all samples."""
    bucket_resolution: PositiveInt | None = None
    """Train and validate only on samples whose area is within 25% of a square with this side in pixels: 256 takes
    256x256 and 192x320. None takes all samples."""
    sample_list: PathText | None = None
    """File that lists the samples to train on, one per line; the first word of a line is the sample's key
    (tools/list_samples.py prints such lines). None takes all samples."""
    tokens_per_batch: Count = 0
    """Tokens per optimizer step over all ranks. The batch size of each bucket follows from it. 0 takes the tokens of
    global_batch_size samples of the largest bucket."""
    tokens_per_micro_batch: Count = 0
    """Tokens per micro-batch. The micro-batch size of each bucket is the number of samples that fit, at least one. 0
    takes micro_batch_size for all buckets."""
    num_workers: Count = 0
    """Number of threads that read ahead. 0 reads each batch when it is needed."""
    max_bad_fraction: Share = 0.01
    """Largest share of unreadable samples. They are skipped and named; a larger share stops the run."""


@dataclass(frozen=True)
class VideoDataConfig(Checked):
    """video files for the autoencoder"""

    video_dir: PathText | None = None
    """Folder of video and image files; subfolders are searched too. An image is a clip of one frame."""
    num_frames: PositiveInt = 17
    """Frames per training clip; 4k + 1 for a whole number k."""
    resolution: PositiveInt = 256
    """Side of the square training crops in pixels."""
    short_side: PositiveInt = 256
    """Short side in pixels to which videos are resized before they are cropped."""
    max_frame_stride: PositiveInt = 1
    """Largest step between the source frames of a training clip. Each clip draws its step from 1 to this number."""
    buckets: tuple[PathText, ...] = ()
    """Clip shapes as frames x height x width, such as 17x192x320. They replace num_frames and square crops. All clips
    of a batch have one shape. A video takes the shape of each length whose aspect ratio is nearest to its own. A shape
    that is listed twice is drawn twice as often."""
    shot_index: PathText | None = None
    """Folder of the index that tools/index_shots.py made of the videos. None takes .shots in --video-dir, if it is
    there."""
    holdout_every: Count = 0
    """Hold out every n-th shot of each video for validation, and every n-th of the videos with fewer shots. 0 holds out
    none."""
    valid_video_dir: PathText | None = None
    """Folder of video files for validation, instead of --holdout-every."""
    valid_shot_index: PathText | None = None
    """Folder of the index of --valid-video-dir. None takes .shots in it, if it is there."""
    num_workers: Count = 0
    """Threads that read clips ahead. 0 reads each batch when it is needed."""
    valid_resolution: PositiveInt | None = None
    """Side of the square centre crops of held-out clips in pixels. None takes --resolution."""
    cache_gib: NonNegative = 4.0
    """Memory for decoded videos in GiB. Videos that do not fit are decoded again for each clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames must be 4k+1 (1, 5, 9, 13, 17, ...), got {self.num_frames}; "
                f"try {self.num_frames // 4 * 4 + 1}"
            )
        if self.valid_video_dir is not None and self.holdout_every:
            raise ValueError(
                f"valid_video_dir {self.valid_video_dir} excludes holdout_every {self.holdout_every}: give one of them"
            )
        if self.short_side < self.resolution:
            raise ValueError(f"short_side {self.short_side} is smaller than resolution {self.resolution}")
        if self.valid_side > self.short_side:
            raise ValueError(f"short_side {self.short_side} is smaller than valid_resolution {self.valid_side}")

    @property
    def valid_side(self) -> int:
        """Side of held-out clips in pixels."""
        return self.resolution if self.valid_resolution is None else self.valid_resolution
