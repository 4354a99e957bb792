"""The video autoencoder FSAE in its causal form (paper section 2.2): video to latents and back, whole or in chunks.

Time: latent 0 is frame 0, latent i >= 1 is frames 4i-3 .. 4i. So the first frame's latent is that of the frame alone,
and a clip can be encoded and decoded latent by latent with exactly the result of doing it at once.
"""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.decoder import Decoder
from megatron_fsvideo.models.fsae.encoder import NUM_TEMPORAL_STAGES, Encoder
from megatron_fsvideo.models.fsae.streaming import StreamCache


class FSAE(nn.Module):
    """Causal video autoencoder.

    Attributes:
        spatial_factor: pixels per latent position, per side.
        temporal_factor: frames per latent after the first.
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

    def forward(self, video: Tensor) -> Tensor:
        """The reconstruction of a video [b, 3, f, h, w]."""
        return self.decode(self.encode(video))

    def encode(self, video: Tensor) -> Tensor:
        """Video [b, 3, 4k+1, h, w] in [-1, 1] -> latents [b, c, k+1, h/s, w/s].

        Raises:
            ValueError: another number of frames, or a side that is not a multiple of the spatial factor.
        """
        return self.encode_chunk(video, None)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, c, k+1, h/s, w/s] -> video [b, 3, 4k+1, h, w], about [-1, 1] (not clamped).

        Raises:
            ValueError: another number of channels.
        """
        return self.decode_chunk(latents, None)

    def encode_chunk(self, video: Tensor, cache: StreamCache | None) -> Tensor:
        """Encode the next frames of a stream: 4k+1 of them at its start, then multiples of 4.

        Args:
            video: [b, 3, f, h, w].
            cache: the stream's past, which this updates; None is a whole clip.

        Raises:
            ValueError: as `encode`.
        """
        self._check_video(video, continues=cache is not None and cache.started)
        latents = self.encoder(video, cache)
        _mark_started(cache)
        return latents

    def decode_chunk(self, latents: Tensor, cache: StreamCache | None) -> Tensor:
        """Decode the next latents of a stream, any number: 4 frames each, 1 for the stream's first."""
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be [b, {self.latent_channels}, t, h, w], got {list(latents.shape)}: "
                "made by another autoencoder?"
            )
        video = self.decoder(latents, cache)
        _mark_started(cache)
        return video

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode one stream chunk by chunk (see `encode_chunk`)."""
        cache = StreamCache()
        for chunk in chunks:
            yield self.encode_chunk(chunk, cache)

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode one stream chunk by chunk (see `decode_chunk`)."""
        cache = StreamCache()
        for chunk in chunks:
            yield self.decode_chunk(chunk, cache)

    def first_frame_features(self, frame: Tensor) -> list[Tensor]:
        """Encoder features [b, width, 1, h, w] of one frame [b, 3, 1, h, w] at the stages of the latents' frame rate.

        Returns:
            pixel side first; what a decoder can attend to for the first frame's detail.
        """
        self._check_video(frame, continues=False)
        return [stage[:, :, :1] for stage in self.encoder.stage_outputs(frame, None)][NUM_TEMPORAL_STAGES:]

    def _check_video(self, video: Tensor, continues: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [b, 3, f, h, w], got {list(video.shape)}")
        num_frames, height, width = video.shape[2:]
        rest = 0 if continues else 1
        if num_frames < 1 or num_frames % self.temporal_factor != rest:
            rule = "a multiple of 4 after a stream's first chunk" if continues else "4k+1 (1, 5, 9, 13, 17, ...)"
            raise ValueError(f"{num_frames} frames cannot be encoded: the count must be {rule}")
        for name, side in (("height", height), ("width", width)):
            if side % self.spatial_factor or side == 0:
                below = side // self.spatial_factor * self.spatial_factor
                raise ValueError(
                    f"{name} {side} is not a multiple of the spatial factor {self.spatial_factor}; "
                    f"try {below or self.spatial_factor} or {below + self.spatial_factor}"
                )


@torch.no_grad()
def fingerprint(fsae: FSAE) -> str:
    """SHA-256 (hex) of the architecture and the weights: equal exactly when two autoencoders make equal latents.

    The device does not matter; the dtype does, since rounded weights encode differently.
    """
    digest = hashlib.sha256(repr(fsae.config).encode())
    for name, tensor in sorted(fsae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _mark_started(cache: StreamCache | None) -> None:
    if cache is not None:
        cache.started = True
