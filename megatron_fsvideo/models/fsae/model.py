"""The video autoencoder (paper section 2.2): causal encoder; causal, Standard or Lite decoder; streaming.

Shapes: video [b, 3, f, h, w] in [-1, 1] with f = 4k+1; latents [b, c, k+1, h/s, w/s]. Latent 0 is frame 0, latent i
is frames 4i-3 .. 4i. A video may be encoded in chunks with equal results, and decoded unless the decoder is Standard:

    cache = StreamCache()
    latents = torch.cat([fsae.encode_chunk(chunk, cache) for chunk in chunks], dim=2)
"""

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.blocks import TEMPORAL_STAGES, Stage
from megatron_fsvideo.models.fsae.context import DecodeContext, NoiseSeed
from megatron_fsvideo.models.fsae.decoder import Decoder
from megatron_fsvideo.models.fsae.encoder import Encoder
from megatron_fsvideo.models.fsae.streaming import StreamCache


class FSAE(nn.Module):
    """Encoder and decoder of one configuration.

    Attributes:
        spatial_factor, temporal_factor: pixels and frames per latent position.
        latent_channels: channels of the latents.
    """

    def __init__(self, config: FSAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_factor = config.spatial_factor
        self.temporal_factor = config.temporal_factor
        self.latent_channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, video: Tensor, latent_noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruct: (reconstruction like `video`, latents).

        Args:
            latent_noise: like the latents; added before decoding, in units of each channel's standard deviation.

        Raises:
            ValueError: a size that `encode` refuses.
        """
        latents = self.encode(video)
        if latent_noise is None:
            return self.decode(latents), latents
        return self.decode(noisy(latents, latent_noise)), latents

    def encode(self, video: Tensor) -> Tensor:
        """video [b, 3, 4k+1, h, w] -> latents [b, c, k+1, h/s, w/s].

        Raises:
            ValueError: frames not 4k+1, or sides that are not multiples of the spatial factor.
        """
        self.check_whole_video(video)
        return self.encoder(video)

    def decode(
        self, latents: Tensor, first_frame_features: Sequence[Tensor] | None = None, noise_seed: NoiseSeed = 0
    ) -> Tensor:
        """latents [b, c, k+1, h, w] -> video [b, 3, 4k+1, h*s, w*s], not clamped.

        Args:
            first_frame_features: of `first_frame_features`; without them a Standard or Lite decoder skips its attention
                to the first frame. A causal decoder has none.
            noise_seed: which noise a Standard or Lite decoder adds: one for all samples, or one for each.

        Raises:
            ValueError: another number of channels, or features of another frame size.
        """
        self._check_latents(latents)
        return self.decoder(latents, DecodeContext(None, first_frame_features, None, noise_seed))

    def encode_chunk(self, video: Tensor, cache: StreamCache) -> Tensor:
        """Encode the next frames of a stream: 4k+1 at its start, then 4k. `cache` is advanced.

        Raises:
            ValueError: a number of frames that does not end on a latent frame.
        """
        self._check_video(video)
        frames, factor = video.shape[2], self.temporal_factor
        if cache.position == 0 and frames % factor != 1:
            raise ValueError(_frames_message(frames, factor))
        if cache.position > 0 and (frames % factor or not frames):
            raise ValueError(f"a later chunk of a stream needs a multiple of {factor} frames, got {frames}")
        latents = self.encoder(video, cache)
        cache.position += frames
        return latents

    def decode_chunk(
        self,
        latents: Tensor,
        cache: StreamCache,
        first_frame_features: Sequence[Tensor] | None = None,
        noise_seed: NoiseSeed = 0,
    ) -> Tensor:
        """Decode any number of latent frames of a stream: k+1 give 4k+1 frames at its start, k give 4k later.

        Raises:
            ValueError: another number of channels, or a Standard decoder.
        """
        if not self.decoder.streams:
            raise ValueError(
                "a Standard decoder sees both ways in time and cannot decode in chunks exactly: decode the whole "
                "video, use tiling.decode_frames (blended tiles), or a Lite decoder"
            )
        self._check_latents(latents)
        video = self.decoder(latents, DecodeContext(cache, first_frame_features, None, noise_seed))
        cache.position += latents.shape[2]
        return video

    def first_frame_features(self, frame: Tensor) -> list[Tensor]:
        """Encoder features [b, width, 1, h, w] of one frame [b, 3, 1, h, w] at the stages of the latents' frame rate.

        Returns:
            pixel side first; what a decoder can attend to for the first frame's detail.
        """
        self._check_video(frame)
        stages = self.encoder.stage_outputs(frame[:, :, :1], None)
        return stages[TEMPORAL_STAGES - self.encoder.first_stage :]

    def recompute(self, enabled: bool, *, outer_encoder: bool = True) -> None:
        """In training keep only the inputs of blocks, and compute the blocks again in the backward pass.

        Args:
            outer_encoder: False leaves the encoder's outer stages out, which are recomputed as a whole already.
        """
        for module in self.modules():
            if isinstance(module, Stage):
                module.recompute = enabled
        if not outer_encoder:
            for stage in self.encoder.stages[: self.encoder.num_outer]:
                stage.recompute = False

    def check_whole_video(self, video: Tensor) -> None:
        """Refuse a video whose size `encode` does not take."""
        self._check_video(video)
        if video.shape[2] % self.temporal_factor != 1:
            raise ValueError(_frames_message(video.shape[2], self.temporal_factor))

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [batch, 3, frames, height, width], got {list(video.shape)}")
        factor, (height, width) = self.spatial_factor, video.shape[3:]
        if height % factor or width % factor or not height or not width:
            nearest = [max(1, round(side / factor)) * factor for side in (height, width)]
            raise ValueError(
                f"video of {height}x{width} (height x width): both sides must be multiples of the autoencoder's "
                f"spatial factor {factor}; resize or crop to {nearest[0]}x{nearest[1]}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.shape[2]:
            raise ValueError(
                f"latents must be [batch, {self.latent_channels}, frames, height, width], got {list(latents.shape)}"
            )


def noisy(latents: Tensor, noise: Tensor) -> Tensor:
    """latents [b, c, t, h, w] + noise of the same shape in units of each channel's standard deviation."""
    # With its gradient: a constant scale would reward larger latents, which grow without bound then.
    scale = latents.float().std(dim=(0, 2, 3, 4), keepdim=True)
    return latents + (scale * noise).to(latents.dtype)


def _frames_message(frames: int, factor: int) -> str:
    below = max(0, frames - 1) // factor * factor + 1
    return (
        f"a video needs {factor}k+1 frames (1, {factor + 1}, {2 * factor + 1}, ...), got {frames}; "
        f"use the first {below} or read {below + factor}"
    )
