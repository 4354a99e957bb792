"""A decoder's inputs beside the latents: their place in time and in the frame, the first frame, the noise.

A tile or patch is decoded with the noise and the attention that it has inside the whole frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fsvideo.models.fsae.streaming import Stream
from megatron_fsvideo.parallel.seeds import derive_seed

NoiseSeed = int | tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Place of a feature map in the whole frame's map, in positions of its own resolution."""

    top: int
    left: int
    frame_height: int
    frame_width: int

    def doubled(self) -> "Window":
        """This window in positions of twice the resolution, as after an upsampling."""
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
        noise_seed: which noise the residual blocks get: one for all samples, or one for each.
    """

    stream: Stream | None = None
    features: Sequence[Tensor] | None = None
    window: Window | None = None
    noise_seed: NoiseSeed = 0

    def window_of(self, latents: Tensor) -> Window:
        """The window of the latents in the whole frame."""
        return self.window or Window(0, 0, latents.shape[-2], latents.shape[-1])

    def noise_map(self, site: str, window: Window, like: Tensor) -> Tensor:
        """Standard Gaussian noise [b or 1, 1, 1, h, w] for one place in the network, equal for all frames.

        It is drawn for the whole frame and cropped, so tiles see the noise of the whole; and it does not change over
        time, which would flicker (LTX-Video's noise injection).
        """
        height, width = like.shape[-2:]
        key = (site, self.noise_seed, window, height, width)
        kept = {} if self.stream is None else self.stream.kept
        if key not in kept:
            kept[key] = self._draw((1, 1), window, like, site)
        return kept[key]

    def noise_volume(self, site: str, window: Window, like: Tensor, frames_per_latent: int) -> Tensor:
        """Standard Gaussian noise [b or 1, c, t, h, w] for `like` [b, c, t, h, w], another in each frame of the video.

        Each frame is drawn by its number and for the whole frame, so that slices and tiles see the noise of the whole.
        """
        latents = 0 if self.stream is None else self.stream.first_latent
        first = max(0, frames_per_latent * (latents - 1) + 1)
        channels, num_frames = like.shape[1:3]
        numbers = range(first, first + num_frames)
        return torch.cat([self._draw((channels, 1), window, like, site, number) for number in numbers], dim=2)

    def _draw(self, shape: tuple[int, int], window: Window, like: Tensor, *role: int | str) -> Tensor:
        """Noise [b or 1, *shape, h, w] of the window, drawn for the whole frame of each sample."""
        samples = []
        for seed in (self.noise_seed,) if isinstance(self.noise_seed, int) else self.noise_seed:
            generator = torch.Generator().manual_seed(derive_seed(seed, "decoder_noise", *role))
            frame = torch.randn(*shape, window.frame_height, window.frame_width, generator=generator)
            samples.append(window.crop(frame, *like.shape[-2:]).to(like.device, like.dtype))
        return torch.stack(samples)
