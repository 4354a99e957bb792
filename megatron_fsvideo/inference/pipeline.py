"""Image and prompt to video: encode, denoise, decode (paper section 2.5, without upsampler and refiner).

Dimension letters: b requests, c latent channels, t h w latent frames, rows and columns, f frames.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.video import from_unit, resize_and_crop, to_unit
from megatron_fsvideo.diffusion.conditions import first_frame_condition
from megatron_fsvideo.diffusion.guidance import guided
from megatron_fsvideo.diffusion.samplers import euler_sample, euler_sigmas
from megatron_fsvideo.inference.loading import LoadedDiT
from megatron_fsvideo.models.codecs import FSAECodec, LatentScale
from megatron_fsvideo.models.dit import Denoiser
from megatron_fsvideo.models.encoders import ImageEncoder, TextEncoder
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.seeds import sample_generator

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled.

    Attributes:
        guidance_scale: 1 is one model call a step, without guidance.
    """

    num_inference_steps: int
    guidance_scale: float
    sigma_shift: float


class ImageToVideoPipeline:
    """A DiT, its autoencoder and its encoders, ready to generate clips of one bucket.

    Raises:
        ValueError: a bucket that autoencoder or patch size do not divide.
    """

    def __init__(
        self,
        dit: LoadedDiT,
        codec: FSAECodec,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        bucket: Bucket,
        pgs: ProcessGroups,
    ) -> None:
        compression = codec.compression
        bucket.check_factors(compression.spatial, compression.temporal)
        self.dit, self.bucket, self.pgs = dit, bucket, pgs
        self.codec = codec.with_scale(LatentScale(dit.data["latent_mean"], dit.data["latent_std"]))
        self.latent_frames = compression.latent_frames(bucket.num_frames)
        self.text_encoder, self.image_encoder = text_encoder, image_encoder

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompt: str = "",
        progress: Progress = iter,
    ) -> Tensor:
        """Generate one clip per request.

        Args:
            images: uint8 [height, width, 3] of any size; scaled to cover the bucket and cropped.
            negative_prompt: what guidance leads away from.

        Returns:
            video, uint8 [b, f, height, width, 3], in host memory.
        """
        first_frames = torch.cat([self.prepare_image(image) for image in images])  # (b, 3, 1, height, width)
        latents = self.sample_latents(first_frames, prompts, seeds, sampling, negative_prompt, progress)
        return self.decode(latents, first_frames)

    def prepare_image(self, image: Tensor) -> Tensor:
        """uint8 [height, width, 3] -> the bucket's first frame [1, 3, 1, height, width] in [-1, 1]."""
        cropped = resize_and_crop(image[None], self.bucket.height, self.bucket.width)
        return to_unit(cropped)[None].to(self.pgs.device)

    def sample_latents(
        self,
        first_frames: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompt: str,
        progress: Progress,
    ) -> Tensor:
        """Normalised latents [b, c, t, h, w]."""
        encoded = self.codec.encode(first_frames)  # (b, c, 1, h, w)
        shape = (*encoded.shape[:2], self.latent_frames, *encoded.shape[3:])
        image = self._image_features(first_frames)
        network = self.dit.network
        conditional = first_frame_condition(
            encoded.expand(shape),
            network.model.mask_channels,
            self._text_features(prompts),
            image,
            repeat=network.diffusion.repeat_condition,
        )
        unconditional = replace(conditional, text=self._text_features([negative_prompt] * len(prompts)))
        denoiser = Denoiser(self.dit.model, network.diffusion.prediction_type)
        velocity = guided(denoiser.under(conditional), denoiser.under(unconditional), sampling.guidance_scale)
        noise = torch.stack([_noise(seed, shape[1:]) for seed in seeds]).to(self.pgs.device)
        sigmas = euler_sigmas(sampling.num_inference_steps, sampling.sigma_shift)
        return euler_sample(velocity, noise, sigmas, progress)

    def decode(self, latents: Tensor, first_frames: Tensor) -> Tensor:
        """Normalised latents [b, c, t, h, w] -> uint8 [b, f, height, width, 3], in host memory.

        Args:
            first_frames: [b, 3, 1, height, width] in [-1, 1].
        """
        clips = []
        for one, frame in zip(latents.split(1), first_frames.split(1), strict=True):
            parts = self.codec.decode_stream(one, frame)
            clips.append(torch.cat([from_unit(part[0]).cpu() for part in parts]))
        return torch.stack(clips)

    def _text_features(self, prompts: Sequence[str]) -> Tensor | None:
        if not self.dit.network.model.text_embed_dim:
            return None
        return self.text_encoder.encode(prompts)[0].to(self.pgs.device)

    def _image_features(self, first_frames: Tensor) -> Tensor | None:
        if not self.dit.network.model.image_embed_dim:
            return None
        return self.image_encoder.encode(first_frames[:, :, 0]).to(self.pgs.device)


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise [c, t, h, w] of one request: a function of its seed, not of the batch or the rank it lands on."""
    return torch.randn(shape, generator=sample_generator(seed, 0, 0, "generation"))
