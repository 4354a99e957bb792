"""Latents to tokens and back. Tokens run over (t, h, w), w fastest."""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fsvideo.parallel.sequence import scatter_tokens

Grid = tuple[int, int, int]


def token_grid(latent_shape: tuple[int, int, int], patch_size: Grid) -> Grid:
    """Tokens along (t, h, w) for latents of shape (t, h, w).

    Raises:
        ValueError: a side is not a multiple of the patch's.
    """
    for name, size, patch in zip(("frames", "rows", "columns"), latent_shape, patch_size, strict=True):
        if size % patch:
            raise ValueError(f"{size} latent {name} are not a multiple of the patch's {patch}")
    t, h, w = (size // patch for size, patch in zip(latent_shape, patch_size, strict=True))
    return t, h, w


def patchify(latents: Tensor, patch_size: Grid) -> Tensor:
    """[b, c, t, h, w] -> [b, n, c * pt * ph * pw]; within a token the channel runs slowest, as in a Conv3d kernel."""
    batch, channels, *shape = latents.shape
    t, h, w = token_grid(tuple(shape), patch_size)
    pt, ph, pw = patch_size
    parts = latents.reshape(batch, channels, t, pt, h, ph, w, pw)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * h * w, channels * pt * ph * pw)


def local_tokens(latents: Tensor, patch_size: Grid, group: ProcessGroup) -> Tensor:
    """This rank's tokens [b, n, c * patch volume] of latents [b, c, t, h, w] that all of the group's ranks hold.

    Raises:
        ValueError: sides that the patch does not divide, or tokens that the ranks cannot share evenly.
    """
    return scatter_tokens(patchify(latents, patch_size), 1, group)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """Undo `patchify`: tokens [b, n, c * pt * ph * pw] -> latents [b, c, t, h, w]; `grid` counts tokens."""
    t, h, w = grid
    pt, ph, pw = patch_size
    batch = tokens.shape[0]
    parts = tokens.reshape(batch, t, h, w, -1, pt, ph, pw)
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, -1, t * pt, h * ph, w * pw)


def append_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """Zeros behind the rows of [s, ...], to `num_rows` in all; the tensor itself if it has as many."""
    missing = num_rows - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor


def round_up(number: int, multiple: int) -> int:
    """The next multiple, or the number if it is one."""
    return number + -number % multiple
