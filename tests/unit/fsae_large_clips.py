"""Jobs that train on patches and tiles, tiny: 12 x 12 cells of which 10 are decoded; a margin of 4 at each cut."""

from pathlib import Path

import torch

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.video import write_video

SIDE, NUM_FRAMES = 96, 17
CUTS = {"encoder_tile": 32, "patch_rows": 10, "patch_columns": 11, "recompute_granularity": "full"}
DECODERS = {
    5: {"decoder": "standard", "first_frame_head_dim": 8},
    6: {"decoder": "lite", "decoder_widths": (4, 4, 8, 8, 16), "first_frame_head_dim": 8},
}


def make_large_film(folder: Path) -> Path:
    """A texture that moves one pixel a frame."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(3, 16, 16, generator=generator)
    texture = torch.nn.functional.interpolate(texture[None], (104, 104), mode="bilinear")[0] * 255
    frames = torch.stack([texture.roll(k, dims=2) for k in range(24)]).movedim(1, -1).to(torch.uint8)
    write_video(folder / "film.mp4", frames, fps=25)
    return folder


def large_job(phase: int, video_dir: Path, **changes) -> FSAEJob:
    """Every loss there is that needs no weights of others, on whole clips unless `changes` has CUTS."""
    values = {"widths": (8, 8, 8, 8, 16), "encoder_depths": (1,) * 5, "decoder_depths": (1,) * 5}
    values |= {"phase": phase, "video_dir": str(video_dir), "num_frames": NUM_FRAMES, "resolution": SIDE}
    values |= {"short_side": SIDE, "micro_batch_size": 1, "global_batch_size": 2, "image_batch_size": 2}
    values |= {"discriminator_width": 4, "discriminator_scales": 2, "discriminator_layers": 1, "r1_interval": 2}
    values |= {"gradient_weight": 0.5, "multiscale_weight": 0.5, "ssim_weight": 0.2, "latent_penalty": 0.1}
    values |= {"lr": 1e-3, "adam_eps": 1e-4, "vf_weight": 0.0, "image_fraction": 0.3}
    return build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values | DECODERS.get(phase, {}) | changes)
