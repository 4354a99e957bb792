"""DINOv2's patch tokens, frame by frame. Video VF aligns the latents with them (paper section 2.2.2)."""

from math import sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import require
from megatron_fsvideo.models.frozen.pretrained import PretrainedSource, load_pretrained

# The statistics that DINOv2 was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRAMES_AT_ONCE = 16


class DINOv2Features(nn.Module):
    """A frozen DINOv2.

    Args:
        model: transformers' Dinov2Model.
        grid: patches per side of a square frame (16: 224 pixels with patches of 14); other shapes get about as many.
    """

    def __init__(self, model: nn.Module, grid: int = 16) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.grid = grid
        self.channels: int = model.config.hidden_size
        self.patch_size: int = model.config.patch_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """video [b, 3, f, h, w] in [-1, 1] -> tokens [b, channels, f, rows, columns]."""
        b, _, num_frames, height, width = video.shape
        rows, columns = (max(1, round(self.grid * sqrt(r))) for r in (height / width, width / height))
        frames = video.transpose(1, 2).flatten(0, 1)
        tokens = [self._tokens(part, rows, columns) for part in frames.split(FRAMES_AT_ONCE)]
        return torch.cat(tokens).unflatten(0, (b, num_frames)).movedim(2, 1)

    def _tokens(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        """[n, 3, h, w] -> [n, channels, rows, columns]."""
        size = (rows * self.patch_size, columns * self.patch_size)
        resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = ((resized + 1) / 2 - self.mean) / self.std
        states = self.model(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
        return states.transpose(1, 2).unflatten(2, (rows, columns))


def load_dinov2(folder: str | Path, device: torch.device, grid: int = 16) -> DINOv2Features:
    """Load DINOv2 from a folder that transformers has saved (`config.json`, `model.safetensors`). No download.

    Raises:
        ValueError: no such folder, or not a DINOv2 without registers.
        ImportError: transformers is missing.
    """
    transformers = require("transformers", "encoders")
    if not Path(folder).is_dir():
        raise ValueError(f"vf_encoder_path {folder} is not a folder with DINOv2 as transformers saves it")
    source = PretrainedSource(f"vf_encoder_path {folder}", str(folder))
    model = load_pretrained(transformers.Dinov2Model, source, ["dinov2"], torch.float32, ["classifier."])
    return DINOv2Features(model, grid).to(device)
