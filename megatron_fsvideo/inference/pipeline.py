"""Image and prompt to video: encode, denoise, decode (paper section 2.5, without upsampler and refiner).

    pipeline = ImageToVideoPipeline.from_pretrained("runs/dit")
    clips = pipeline([read_image("photo.png")], ["pan left"], [0], pipeline.sampling())

Dimension letters: b requests, c latent channels, t h w latent frames, rows and columns, f frames.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fsvideo.config import DiTParallelConfig, PipelineParts
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.video import from_unit, resize_and_crop, to_unit
from megatron_fsvideo.diffusion.conditions import first_frame_condition
from megatron_fsvideo.diffusion.guidance import guided
from megatron_fsvideo.diffusion.samplers import euler_sample, euler_sigmas
from megatron_fsvideo.inference.loading import LoadedDiT, load_autoencoder, load_dit
from megatron_fsvideo.inference.requests import nearest_bucket
from megatron_fsvideo.models.codecs import FSAECodec, LatentScale
from megatron_fsvideo.models.dit import Denoiser
from megatron_fsvideo.models.frozen.encoders import (
    ImageEncoder,
    TextEncoder,
    confirmed_name,
    load_image_encoder,
    load_text_encoder,
)
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.dtypes import DTYPES
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.seeds import sample_generator

DEFAULT_GUIDANCE_SCALE = 5.0
DEFAULT_FPS = 24.0

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler.

    Attributes:
        guidance_scale: scale of classifier-free guidance; 1 means none, with one model call a step.
    """

    num_inference_steps: int
    guidance_scale: float
    sigma_shift: float


class ImageToVideoPipeline:
    """Generates videos with a DiT, the codec of its latents and the encoders of its conditions.

    Args:
        text_encoder: needed on rank 0 only; other ranks may pass None. It is on the device only while it encodes.
    """

    def __init__(
        self,
        dit: LoadedDiT,
        codec: FSAECodec,
        text_encoder: TextEncoder | None,
        image_encoder: ImageEncoder,
        pgs: ProcessGroups,
    ) -> None:
        self.dit, self.pgs = dit, pgs
        self.compression = codec.compression
        self.codec = codec.with_scale(LatentScale(dit.data["latent_mean"], dit.data["latent_std"]))
        self.text_encoder, self.image_encoder = text_encoder, image_encoder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        parts: PipelineParts | None = None,
        parallel: DiTParallelConfig | None = None,
        pgs: ProcessGroups | None = None,
    ) -> "ImageToVideoPipeline":
        """Load a release, or the newest checkpoint of a --save folder, with the codec and the encoders that it names.

        Args:
            pgs: process groups of the layout `parallel`; None creates them.

        Raises:
            ValueError: something is missing, damaged, or does not belong to the DiT.
        """
        parts, parallel = parts or PipelineParts(), parallel or DiTParallelConfig()
        pgs = pgs or groups.initialize(parallel)
        dit = load_dit(folder, parallel, pgs, parts.use_ema)
        codec = load_autoencoder(dit.data, parts.fsae, pgs.device, DTYPES[parts.autoencoder_dtype])
        # The small encoders gain nothing from bf16 on a CPU.
        dtype = torch.bfloat16 if pgs.device.type == "cuda" else torch.float32
        name = confirmed_name("image-encoder", dit.data["image_encoder"]["name"], parts.image_encoder)
        image = load_image_encoder(name, pgs.device, dtype, allow_download=parts.allow_download)
        name = confirmed_name("text-encoder", dit.data["text_encoder"]["name"], parts.text_encoder)
        text = None
        if pgs.is_rank_zero:
            length = dit.data["text_encoder"]["max_length"] or None
            text = load_text_encoder(name, "cpu", dtype, length, allow_download=parts.allow_download)
        return cls(dit, codec, text, image, pgs)

    @property
    def fps(self) -> float:
        """Frames per second of the training data."""
        return float(self.dit.data["fps"] or DEFAULT_FPS)

    @property
    def buckets(self) -> list[Bucket]:
        """Shapes of the clips that the DiT was trained on."""
        return [Bucket.parse(text) for text in self.dit.data["buckets"]]

    def sampling(
        self, num_inference_steps: int = 30, guidance_scale: float | None = None, sigma_shift: float | None = None
    ) -> Sampling:
        """Return the sampler's settings; the checkpoint gives the value of each argument that is None.

        Raises:
            ValueError: guidance is asked for, and the model was trained without empty prompts.
        """
        network = self.dit.network
        trained_without_null = network.diffusion.text_dropout == 0 or not network.model.text_embed_dim
        if guidance_scale is None:
            guidance_scale = 1.0 if trained_without_null else DEFAULT_GUIDANCE_SCALE
        if guidance_scale != 1.0 and trained_without_null:
            raise ValueError(
                f"--guidance-scale {guidance_scale} needs a model trained with text dropout; this one had "
                f"text_dropout {network.diffusion.text_dropout}"
            )
        return Sampling(
            num_inference_steps, guidance_scale, network.diffusion.sigma_shift if sigma_shift is None else sigma_shift
        )

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        bucket: Bucket | None = None,
        negative_prompt: str = "",
        progress: Progress = iter,
    ) -> Tensor:
        """Generate one clip per request; all ranks call this.

        Args:
            images: uint8 [height, width, 3] of any size; scaled to cover the bucket and cropped.
            bucket: shape of the clips; None takes the trained one nearest to the first image.
            negative_prompt: prompt that guidance steers away from.

        Returns:
            video, uint8 [b, f, height, width, 3], in host memory.

        Raises:
            ValueError: the autoencoder's factors or the patch size do not divide the bucket.
        """
        bucket = bucket or nearest_bucket(self.buckets, *images[0].shape[:2])
        bucket.check_factors(self.compression.spatial, self.compression.temporal)
        first_frames = torch.cat([self.prepare_image(image, bucket) for image in images])  # (b, 3, 1, height, width)
        num_latents = self.compression.latent_frames(bucket.num_frames)
        latents = self.sample_latents(first_frames, num_latents, prompts, seeds, sampling, negative_prompt, progress)
        return self.decode(latents, first_frames)

    def prepare_image(self, image: Tensor, bucket: Bucket) -> Tensor:
        """Scale and crop an image uint8 [height, width, 3] to a first frame [1, 3, 1, height, width] in [-1, 1]."""
        cropped = resize_and_crop(image[None], bucket.height, bucket.width)
        return to_unit(cropped)[None].to(self.pgs.device)

    def sample_latents(
        self,
        first_frames: Tensor,
        num_latents: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompt: str,
        progress: Progress,
    ) -> Tensor:
        """Sample normalised latents [b, c, t, h, w], t = `num_latents`, from first frames [b, 3, 1, height, width]."""
        encoded = self.codec.encode(first_frames)  # (b, c, 1, h, w)
        shape = (*encoded.shape[:2], num_latents, *encoded.shape[3:])
        text, negative = self.encode_prompts([*prompts, negative_prompt])
        network = self.dit.network
        conditional = first_frame_condition(
            encoded.expand(shape),
            network.model.mask_channels,
            text,
            self._image_features(first_frames),
            repeat=network.diffusion.repeat_condition,
        )
        denoiser = Denoiser(self.dit.model, network.diffusion.prediction_type)
        velocity = denoiser.under(conditional)
        if sampling.guidance_scale != 1.0:
            unconditional = denoiser.under(replace(conditional, text=negative))
            velocity = guided(velocity, unconditional, sampling.guidance_scale)
        noise = torch.stack([_noise(seed, shape[1:]) for seed in seeds]).to(self.pgs.device)
        sigmas = euler_sigmas(sampling.num_inference_steps, sampling.sigma_shift)
        return euler_sample(velocity, noise, sigmas, progress)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """Encode all prompts but the last to [b, l, e], and the last one to the same shape (repeated), on all ranks.

        Only rank 0 has the encoder (UMT5-XXL takes 11 GB in bf16). It is on the device only while it encodes.
        """
        if not self.dit.network.model.text_embed_dim:
            return None, None
        features = None
        if self.text_encoder is not None:
            self.text_encoder.to(self.pgs.device)
            features = self.text_encoder.encode(prompts)[0].cpu()
            self.text_encoder.to("cpu")
        features = groups.broadcast_object(features).to(self.pgs.device)
        return features[:-1], features[-1:].expand_as(features[:-1])

    def decode(self, latents: Tensor, first_frames: Tensor) -> Tensor:
        """Decode normalised latents [b, c, t, h, w] to uint8 [b, f, height, width, 3], in host memory.

        Args:
            first_frames: [b, 3, 1, height, width] in [-1, 1].
        """
        clips = []
        for one, frame in zip(latents.split(1), first_frames.split(1), strict=True):
            parts = self.codec.decode_stream(one, frame)
            clips.append(torch.cat([from_unit(part[0]).cpu() for part in parts]))
        return torch.stack(clips)

    def _image_features(self, first_frames: Tensor) -> Tensor | None:
        if not self.dit.network.model.image_embed_dim:
            return None
        return self.image_encoder.encode(first_frames[:, :, 0]).to(self.pgs.device)


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise [c, t, h, w] of one request. It depends on the request's seed, not on its batch or rank."""
    return torch.randn(shape, generator=sample_generator(seed, 0, 0, "generation"))
