"""What a job reads: videos for the autoencoder, latent datasets for the DiT."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """latent datasets made by tools/preprocess_latents.py"""

    data_path: tuple[str, ...] = ()
    """Latent dataset folders; several blend by weight: 0.7 videos/ 0.3 images/."""
    valid_data_path: tuple[str, ...] = ()
    """Latent dataset folders for validation, spelled like data_path."""
    num_workers: int = 0
    """Processes that read data ahead; 0 reads in the training process."""
    max_bad_fraction: float = 0.01
    """A larger share of unreadable samples stops the run; below it they are skipped and named."""


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
    holdout_every: int = 0
    """Every n-th shot of each video is held out for validation; 0 holds out none."""

    def __post_init__(self) -> None:
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames must be 4k+1 (1, 5, 9, 13, 17, ...), got {self.num_frames}; "
                f"try {self.num_frames // 4 * 4 + 1}"
            )
        if self.short_side < self.resolution:
            raise ValueError(f"short_side {self.short_side} is smaller than resolution {self.resolution}")
