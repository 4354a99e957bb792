"""The latent regularisations that the paper compares Video VF with (paper Table 1).

A change of the latents' grid must do to the video what it does to an image: `d(D(tau(z)), tau(x))`.

| kind | tau | the loss | source |
|---|---|---|---|
| downscale | latents to 1/2 or 1/4 of their sides | is added | Skorokhodov et al. 2025 |
| upscale | latents to twice their sides | is added | the paper's variant, not spelled out |
| eq-vae | 8/32 .. 31/32 of the sides, 1 to 3 quarter turns | replaces half of the plain ones | Kouzelis et al. 2025 |

EQ-VAE also shrinks the video before encoding it, in a quarter of the other steps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.parallel.seeds import sample_generator

RegularizerKind = Literal["none", "downscale", "upscale", "eq-vae"]

DOWNSCALES = (1 / 2, 1 / 4)
UPSCALE = 2.0
EQ_SCALES = tuple(k / 32 for k in range(8, 32))
EQ_PROBABILITY = 0.5
EQ_PRIOR_PROBABILITY = 0.25


@dataclass(frozen=True)
class LatentTransform:
    """tau: quarter turns, then another size.

    Attributes:
        size: rows and columns of the transformed latents.
        quarter_turns: counter-clockwise.
        role: the transformed reconstruction's loss is added to the plain one's, or replaces it; or the video is
            transformed before it is encoded.
    """

    size: tuple[int, int]
    quarter_turns: int = 0
    role: Literal["added", "replacing", "before_encoding"] = "added"

    def of_latents(self, latents: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, c, t, *size], bilinear."""
        return _resize(latents.rot90(self.quarter_turns, (3, 4)), self.size, "bilinear", antialias=False)

    def of_video(self, video: Tensor, spatial_factor: int) -> Tensor:
        """[b, 3, f, H, W] in [-1, 1] -> the same change in pixels: bilinear with antialias down, bicubic up."""
        rows, columns = (side * spatial_factor for side in self.size)
        turned = video.rot90(self.quarter_turns, (3, 4))
        mode = "bicubic" if rows > turned.shape[3] else "bilinear"
        return _resize(turned, (rows, columns), mode, antialias=True).clamp(-1, 1)


def draw_transform(kind: RegularizerKind, seed: int, number: int, grid: tuple[int, int]) -> LatentTransform | None:
    """The transform of the micro-batch that begins with sample `number`; None for no regularisation of it.

    Args:
        grid: rows and columns of its latents.
    """
    if kind == "none":
        return None
    if kind == "upscale":
        return LatentTransform(_scaled(grid, UPSCALE))
    generator = sample_generator(seed, number, 0, "latent_regularizer")
    if kind == "downscale":
        return LatentTransform(_scaled(grid, DOWNSCALES[_draw(len(DOWNSCALES), generator)]))
    scale, turns = EQ_SCALES[_draw(len(EQ_SCALES), generator)], 1 + _draw(3, generator)
    first, second = torch.rand(2, generator=generator).tolist()
    if first < EQ_PROBABILITY:
        return LatentTransform(_scaled(grid[::-1] if turns % 2 else grid, scale), turns, "replacing")
    return LatentTransform(_scaled(grid, scale), 0, "before_encoding") if second < EQ_PRIOR_PROBABILITY else None


def _scaled(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _resize(x: Tensor, size: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    """[b, c, t, h, w] -> [b, c, t, *size], frame by frame."""
    frames = x.transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(frames, size, mode=mode, align_corners=False, antialias=antialias)
    return resized.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
