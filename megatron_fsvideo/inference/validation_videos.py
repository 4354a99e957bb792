"""Generates videos of a few validation samples during training, from the same first frames, texts and noise each time.

Each data-parallel rank generates, decodes and writes its share, one video after another; after each the ranks meet, so
that none waits longer than one video takes.
"""

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from megatron_fsvideo.config import DiTJob
from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.data.contact_sheet import write_contact_sheet
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.stored_batch import stack
from megatron_fsvideo.data.video import from_unit, write_video
from megatron_fsvideo.diffusion.conditions import first_frame_condition
from megatron_fsvideo.diffusion.guidance import guided
from megatron_fsvideo.diffusion.samplers import euler_sample, euler_sigmas
from megatron_fsvideo.inference.loading import load_autoencoder
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.models.dit import Denoiser, DiTModel
from megatron_fsvideo.parallel.groups import ProcessGroups, gather_objects
from megatron_fsvideo.parallel.seeds import sample_generator

SHEET_COLUMNS = 5
LABEL_LENGTH = 60

# (label, error, frames for the contact sheet uint8 [n, h, w, 3] or None if they were not decoded)
Made = tuple[str, float, Tensor | None]


class ValidationVideos:
    """Generates validation videos with a model that is being trained.

    Args:
        model: this rank's part of the model, which has no pipeline stages.
        dataset: the validation data.

    Raises:
        ValueError: the autoencoder is missing, or not the one of the latents.
    """

    def __init__(self, job: DiTJob, model: DiTModel, dataset: LatentDataset, pgs: ProcessGroups) -> None:
        self.job, self.dataset, self.pgs = job, dataset, pgs
        self.denoiser = Denoiser(model, job.diffusion.prediction_type)
        self.folder = Path(job.logging.tensorboard_dir) / "videos"
        everything = [(k, place) for k, stream in enumerate(dataset.streams) for place in range(stream.num_samples)]
        number = min(job.sampling.num_validation_videos, len(everything))
        self.chosen = [everything[k * len(everything) // number] for k in range(number)]
        self._writes = pgs.tp_rank == pgs.cp_rank == 0  # ranks that share a sample hold equal latents: one writes
        self.codec: FSAECodec | None = None
        if job.sampling.fsae is not None and self._writes:
            dtype = torch.bfloat16 if job.training.bf16 else torch.float32
            self.codec = load_autoencoder(dataset.description(), job.sampling.fsae, torch.device("cpu"), dtype)

    @torch.no_grad()
    def write(self, iteration: int) -> tuple[float, Tensor | None]:
        """Generate all videos; every rank calls this.

        Returns:
            the mean squared error between generated and stored normalised latents; on rank 0 also the contact sheet
            uint8 [h, w, 3] if the videos are decoded.
        """
        folder = self.folder / f"iter_{iteration:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.codec is not None:
            self.codec.to(self.pgs.device)
        made: list[Made] = []
        for begin in range(0, len(self.chosen), self.pgs.dp_size):
            index = begin + self.pgs.dp_rank
            mine = self._make(index, folder) if index < len(self.chosen) else None
            made += [one for one in gather_objects(mine if self._writes else None) if one is not None]
        if self.codec is not None:
            self.codec.to("cpu")  # give the memory back to training
        made.sort(key=lambda one: one[0])
        error = sum(one[1] for one in made) / len(made)
        rows = [(label, frames) for label, _, frames in made if frames is not None]
        if not rows or not self.pgs.is_rank_zero:
            return error, None
        return error, write_contact_sheet(folder / "contact_sheet.png", rows, SHEET_COLUMNS)

    def _make(self, index: int, folder: Path) -> Made:
        sample = self.dataset.read(*self.chosen[index])
        batch = stack([sample], [0], self.dataset.scale, self.dataset.text_length).to(self.pgs.device)
        latents = self._sample(batch)
        error = (latents - batch.latents).square().mean().item()
        label = f"{index:02d} {sample.record['caption']}"[:LABEL_LENGTH]
        if not self._writes:
            return label, error, None
        if self.codec is None:
            stored = self.dataset.scale.restore(latents)[0].bfloat16()
            tensors = {"latents": stored.cpu().contiguous()}
            safetensors.torch.save_file(tensors, folder / f"{index:02d}.safetensors")
            return label, error, None
        video = self._decode(latents, batch.latents[:, :, :1])
        write_video(folder / f"{index:02d}.mp4", video, sample.record["fps"])
        shown = torch.linspace(0, len(video) - 1, min(SHEET_COLUMNS, len(video))).round().long()
        return label, error, video[shown]

    def _decode(self, latents: Tensor, first: Tensor) -> Tensor:
        """Decode normalised latents [1, c, t, h, w] to uint8 [f, height, width, 3].

        Args:
            first: the sample's first latent. The dataset has no pixels; the frame decoded from it is closest to them.
        """
        codec = self.codec.with_scale(self.dataset.scale)
        parts = codec.decode_stream(latents, codec.decode(first).clamp(-1, 1))
        return torch.cat([from_unit(part[0]).cpu() for part in parts])

    def _sample(self, batch: Batch) -> Tensor:
        """Sample normalised latents [1, c, t, h, w] from the sample's text and, for a video, its first frame."""
        job = self.job
        conditional = first_frame_condition(
            batch.latents,
            job.model.mask_channels,
            batch.text,
            batch.image,
            repeat=job.diffusion.repeat_condition,
            hidden=torch.tensor([batch.is_image]),
        )
        negative = torch.zeros_like(batch.text)
        negative[0, : len(self.dataset.negative_text)] = self.dataset.negative_text.to(negative)
        velocity = guided(
            self.denoiser.under(conditional),
            self.denoiser.under(replace(conditional, text=negative)),
            job.sampling.sampling_guidance_scale,
        )
        generator = sample_generator(job.training.seed, int(batch.sample_ids[0]), 0, "generation")
        noise = torch.randn(batch.latents.shape[1:], generator=generator)[None].to(batch.latents.device)
        return euler_sample(velocity, noise, euler_sigmas(job.sampling.num_sampling_steps, job.diffusion.sigma_shift))
