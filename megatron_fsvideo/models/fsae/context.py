"""What a decoder is told beside its latents: where they lie in time and in the frame, the first frame, the noise.

A tile or patch is decoded with the noise and the attention that it has inside the whole frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fsvideo.models.fsae.streaming import Stream
from megatron_fsvideo.parallel.seeds import derive_seed


@dataclass(frozen=True)
class Window:
    """Where a feature map lies in the whole frame's, in positions of its own resolution."""

    top: int
    left: int
    frame_height: int
    frame_width: int

    def doubled(self) -> "Window":
        """The same place at the resolution after an Up."""
        return Window(2 * self.top, 2 * self.left, 2 * self.frame_height, 2 * self.frame_width)

    def crop(self, frame: Tensor, height: int, width: int) -> Tensor:
        """The window's `height` x `width` positions of something [..., frame_height, frame_width]."""
        return frame[..., self.top : self.top + height, self.left : self.left + width]


@dataclass
class DecodeContext:
    """One decoder call.

    Attributes:
        stream: the frames before and after; None for a whole video.
        features: `FSAE.first_frame_features` of the whole first frame; None skips the attention to it.
        window: of the latents in the whole frame; None where they are the whole frame.
        noise_seed: which noise the residual blocks get.
    """

    stream: Stream | None = None
    features: Sequence[Tensor] | None = None
    window: Window | None = None
    noise_seed: int = 0

    def window_of(self, latents: Tensor) -> Window:
        """Where the latents lie."""
        return self.window or Window(0, 0, latents.shape[-2], latents.shape[-1])

    def noise_map(self, site: str, window: Window, like: Tensor) -> Tensor:
        """Standard Gaussian noise [1, 1, 1, h, w] for one place in the network, equal for all samples and frames.

        It is drawn for the whole frame and cropped, so tiles see the noise of the whole; and it does not change over
        time, which would flicker (LTX-Video's noise injection).
        """
        height, width = like.shape[-2:]
        key = (site, self.noise_seed, window, height, width)
        kept = {} if self.stream is None else self.stream.kept
        if key not in kept:
            generator = torch.Generator().manual_seed(derive_seed(self.noise_seed, "decoder_noise", site))
            frame = torch.randn(1, 1, 1, window.frame_height, window.frame_width, generator=generator)
            kept[key] = window.crop(frame, height, width).to(like.device, like.dtype)
        return kept[key]

    def noise_volume(self, site: str, window: Window, like: Tensor, frames_per_latent: int) -> Tensor:
        """Standard Gaussian noise [1, c, t, h, w] for `like` [b, c, t, h, w], another one in each frame of the video.

        Each frame is drawn by its number and for the whole frame, so that slices and tiles see the noise of the whole.
        """
        latents = 0 if self.stream is None else self.stream.first_latent
        first = max(0, frames_per_latent * (latents - 1) + 1)
        channels, num_frames, height, width = like.shape[1:]
        frames = []
        for number in range(first, first + num_frames):
            generator = torch.Generator().manual_seed(derive_seed(self.noise_seed, "decoder_noise", site, number))
            frame = torch.randn(channels, window.frame_height, window.frame_width, generator=generator)
            frames.append(window.crop(frame, height, width).to(like.device, like.dtype))
        return torch.stack(frames, dim=1).unsqueeze(0)
