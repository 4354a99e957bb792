"""The compression of an autoencoder: legal sizes of videos, and the sizes of their latents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """Pixels and frames per latent position. Latent 0 is frame 0, latent i the `temporal` frames that end with i.

    Attributes:
        spatial: pixels per latent row and column.
        temporal: frames per latent frame after the first.
    """

    spatial: int
    temporal: int = 4

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a video; the last one may stand for fewer than `temporal` frames."""
        return 1 + -(-(num_frames - 1) // self.temporal)

    def video_frames(self, latent_frames: int) -> int:
        """Number of frames of the first `latent_frames` latent frames."""
        return 1 + (latent_frames - 1) * self.temporal

    def latent_shape(self, num_frames: int, height: int, width: int, name: str = "the clip") -> tuple[int, int, int]:
        """Latent frames, rows and columns.

        Raises:
            ValueError: the factors do not divide the sizes.
        """
        self.check(num_frames, height, width, name)
        return self.latent_frames(num_frames), height // self.spatial, width // self.spatial

    def check(self, num_frames: int, height: int, width: int, name: str = "the clip") -> None:
        """Refuse sizes that the factors do not divide.

        Args:
            name: name of the object with these sizes, for the message.

        Raises:
            ValueError: a size is not divisible; the message has the nearest sizes that are.
        """
        self.check_frames(num_frames)
        for side_name, side in (("height", height), ("width", width)):
            if side % self.spatial or side < 1:
                below = side // self.spatial * self.spatial
                nearest = f"{below} or {below + self.spatial}" if below else f"{self.spatial}"
                raise ValueError(
                    f"{name}: {side_name} {side} is not a multiple of the autoencoder's spatial factor "
                    f"{self.spatial}; try {nearest}"
                )

    def check_frames(self, num_frames: int) -> None:
        """Refuse a frame count that is not `temporal` k + 1.

        Raises:
            ValueError: the count is not of this form; the message has the neighbouring counts that are.
        """
        if num_frames < 1 or num_frames % self.temporal != 1 % self.temporal:
            below = max(0, num_frames - 1) // self.temporal * self.temporal + 1
            raise ValueError(
                f"a clip of {num_frames} frames: the count must be {self.temporal}k+1; "
                f"try {below} or {below + self.temporal}"
            )
