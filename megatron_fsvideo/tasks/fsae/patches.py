"""The patch of a clip that the decoder's outer stages and the losses see, and the patches that a job allows."""

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEJob
from megatron_fsvideo.models.fsae import FSAE, PatchBox, VideoRegion, draw_box
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.models.fsae.patch import WARM_UP_LATENTS, cell_size, patch_halo
from megatron_fsvideo.models.fsae.tiled_encoder import CELL, tile_halo
from megatron_fsvideo.parallel.seeds import sample_generator


def draw_patch(fsae: FSAE, job: FSAEJob, first: int, video: Tensor) -> PatchBox | None:
    """Draw the patch of the micro-batch that begins with sample `first`; None if the whole clip is decoded.

    The place depends on seed and sample alone, so that resumed runs and all processes of a clip draw the same.

    Args:
        video: frames that this process encodes, [b, 3, f, h, w].
    """
    memory = job.memory
    if not memory.decodes_patch:
        return None
    generator = sample_generator(job.training.seed, first, 0, "patch_box")
    frames, height, width = video.shape[2:]
    # Of 4k+1 frames, or of the 4k that each process but the first has of a shared clip.
    latents = (frames + fsae.temporal_factor - 1) // fsae.temporal_factor
    shape = (len(video), fsae.latent_channels, latents, height // fsae.spatial_factor, width // fsae.spatial_factor)
    size = (memory.patch_latents or latents, memory.patch_rows or height, memory.patch_columns or width)
    return draw_box(generator, fsae.config, shape, size)


def whole_region(region: VideoRegion, shards: FrameShards | None) -> VideoRegion:
    """The region of the whole clip that the regions of all processes form."""
    if shards is None:
        return region
    return VideoRegion(slice(0, shards.num_frames), region.rows, region.columns)


def check_memory_flags(job: FSAEJob) -> None:
    """Refuse patches and tiles that the model or a loss does not allow.

    Raises:
        ValueError: the model or a loss does not allow them; the message has the flag and the numbers.
    """
    memory, cp_size = job.memory, job.parallel.context_parallel_size
    if memory.encoder_tile:
        tile_halo(job.model)
        if memory.encoder_tile % CELL:
            raise ValueError(f"encoder_tile {memory.encoder_tile} is not a multiple of {CELL} pixels")
    is_cut = memory.decodes_patch or cp_size > 1
    if is_cut and job.alignment.latent_regularizer != "none":
        raise ValueError(
            f"latent_regularizer {job.alignment.latent_regularizer} decodes whole frames on one process: leave "
            "patch_latents, patch_rows and patch_columns 0 and context_parallel_size 1"
        )
    if cp_size > 1 and (job.losses.latent_noise > 0 or (job.uses_vf and job.alignment.vf_adaptive)):
        raise ValueError(
            "latent_noise and vf_adaptive need a whole clip on each process: with context_parallel_size "
            f"{cp_size} set them to 0 and no"
        )
    if memory.decodes_patch:
        _check_patch(job)


def _check_patch(job: FSAEJob) -> None:
    memory, halo, cell = job.memory, patch_halo(job.model), cell_size(job.model)
    needed = 1
    if job.uses_gan:
        with torch.device("meta"):
            adversary = job.adversary
            needed = Discriminator(1, adversary.discriminator_scales, adversary.discriminator_layers).smallest_side
    smallest = -(-needed // cell) + 2 * halo
    for name, cells in (("patch_rows", memory.patch_rows), ("patch_columns", memory.patch_columns)):
        if 0 < cells < smallest:
            raise ValueError(
                f"{name} {cells}: {halo} cells of {cell} pixels next to each cut are not used, and the rest must have "
                f"at least {needed} pixels: give {smallest} or more"
            )
    ends = 2 if job.model.decoder == "standard" else 1
    if 0 < memory.patch_latents <= ends * WARM_UP_LATENTS:
        raise ValueError(
            f"patch_latents {memory.patch_latents}: {WARM_UP_LATENTS} latent frames at each of {ends} cuts in time are "
            f"not used: give {ends * WARM_UP_LATENTS + 1} or more"
        )
