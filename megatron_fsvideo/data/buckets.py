"""Buckets: the few clip shapes a data set is cut to, so that batches have one shape (paper section 3; Wan, NovelAI).

A bucket is spelled frames x height x width: `121x704x1280`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from megatron_fsvideo.config import Compression


@dataclass(frozen=True, order=True)
class Bucket:
    """Shape of a clip in pixels. `num_frames` is 4k+1: the causal autoencoder keeps frame 0 and groups the others."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        Compression(1).check_frames(self.num_frames)
        if min(self.height, self.width) < 1:
            raise ValueError(f"bucket {self}: sides must be positive")

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read `frames x height x width`, as in 9x96x96.

        Raises:
            ValueError: not three whole numbers, or a frame count that is not 4k+1.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError(f"bucket {text!r} is not spelled frames x height x width, as in 9x96x96")
        return cls(*map(int, parts))

    @property
    def aspect_ratio(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames."""
        return self.num_frames * self.height * self.width

    def check_factors(self, spatial_factor: int, temporal_factor: int = 4) -> None:
        """Refuse sides or frames that the autoencoder cannot divide.

        Raises:
            ValueError: with the numbers and the nearest size that works.
        """
        compression = Compression(spatial_factor, temporal_factor)
        compression.check(self.num_frames, self.height, self.width, f"bucket {self}")

    def latent_shape(self, spatial_factor: int, temporal_factor: int = 4) -> tuple[int, int, int]:
        """(t, h, w) of the clip's latents."""
        compression = Compression(spatial_factor, temporal_factor)
        return compression.latent_shape(self.num_frames, self.height, self.width, f"bucket {self}")

    def num_tokens(
        self,
        spatial_factor: int,
        temporal_factor: int = 4,
        patch_size: tuple[int, int, int] = (1, 1, 1),
    ) -> int:
        """Tokens of one clip in the DiT.

        Raises:
            ValueError: the patch does not divide the latents.
        """
        count = 1
        shape = self.latent_shape(spatial_factor, temporal_factor)
        for name, length, patch in zip(("frames", "rows", "columns"), shape, patch_size, strict=True):
            if length % patch:
                raise ValueError(f"bucket {self}: {length} latent {name} are not a multiple of the patch's {patch}")
            count *= length // patch
        return count


def choose_bucket(buckets: Sequence[Bucket], height: int, width: int, num_frames: int) -> Bucket | None:
    """The bucket for a source clip: nearest log aspect ratio, then most frames, then most pixels.

    Only buckets the clip is long enough for are taken; None when there is none. A clip smaller than its bucket is
    enlarged: whether that is wanted is a question of curation.
    """
    fitting = [bucket for bucket in buckets if bucket.num_frames <= num_frames]
    if not fitting:
        return None
    ratio = log(width / height)
    # Rounded, so that ratios equal up to arithmetic tie and the next criterion decides.
    return min(
        fitting,
        key=lambda b: (
            round(abs(log(b.aspect_ratio) - ratio), 6),
            -b.num_frames,
            -b.height * b.width,
            b,
        ),
    )
