"""Decoder attention to the encoder's features of the first frame (paper section 2.2.3, Figure 3).

The image that a video is generated from is known in full detail; the latents are not. In five stages (6 to 2 of the
paper's sizes) every frame's positions look up the first frame's features of the same resolution. Large frames are cut
into aligned squares, and each attends to the same square of the first frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.context import Window
from megatron_fsvideo.models.fsae.layers import PixelNorm

ROTARY_BASE = 100.0
"""Positions attend at most a window (32) apart: slower rotations would not tell them apart."""


class FirstFrameAttention(nn.Module):
    """x + out(softmax(q k^T) v) with k, v of the first frame. Starts as the identity (`out` is zero).

    There is no encoding of time: any slice of frames gives the same result.

    Args:
        channels: of the decoder stage.
        feature_channels: of the encoder stage.
        head_dim: width of one head.
        window: side of the squares, in positions; a frame of up to window x window positions is one square.

    Raises:
        ValueError: a width that does not split into heads, or heads that do not split into rotated pairs of 2 axes.
    """

    def __init__(
        self, channels: int, feature_channels: int, head_dim: int, window: int, norms: tuple[PixelNorm, PixelNorm]
    ) -> None:
        super().__init__()
        if channels % head_dim or head_dim % 4:
            raise ValueError(
                f"first_frame_head_dim {head_dim} must divide the decoder's width {channels} and be a multiple of 4"
            )
        self.head_dim = head_dim
        self.window = window
        self.query_norm, self.feature_norm = norms
        self.query = nn.Conv3d(channels, channels, 1, bias=False)
        self.key = nn.Conv3d(feature_channels, channels, 1, bias=False)
        self.value = nn.Conv3d(feature_channels, channels, 1, bias=False)
        self.out = nn.Conv3d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, feature: Tensor, place: Window) -> Tensor:
        """x [b, c, t, h, w] at `place` in the frame, feature [b or 1, c', 1, H, W] of the whole frame -> as x.

        Raises:
            ValueError: a feature of another size than the frame's.
        """
        height, width = x.shape[-2:]
        frame = (place.frame_height, place.frame_width)
        if tuple(feature.shape[-2:]) != frame:
            raise ValueError(
                f"the first frame's features are {feature.shape[-2]}x{feature.shape[-1]} where the video is "
                f"{frame[0]}x{frame[1]} (height x width): encode the first frame at the video's size"
            )
        q = self.query(self.query_norm(x))
        feature = self.feature_norm(feature)
        k, v = self.key(feature).to(q.dtype), self.value(feature).to(q.dtype)
        q = rotate(q, place.top, place.left, self.head_dim)
        k = rotate(k, 0, 0, self.head_dim)
        side = max(frame) if frame[0] * frame[1] <= self.window**2 else self.window
        rows = []
        for top, bottom in _squares(place.top, height, side):
            row = []
            for left, right in _squares(place.left, width, side):
                inside = q[..., top - place.top : bottom - place.top, left - place.left : right - place.left]
                square = (..., _aligned(top, side), _aligned(left, side))
                row.append(self._attend(inside, k[square], v[square]))
            rows.append(torch.cat(row, dim=-1))
        return x + self.out(torch.cat(rows, dim=-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, c, t, h, w] to [b or 1, c, 1, h', w']."""
        b = q.shape[0]
        heads = [x.expand(b, -1, -1, -1, -1).unflatten(1, (-1, self.head_dim)).flatten(3) for x in (q, k, v)]
        # Without contiguous heads torch has no fused kernel, and holds a matrix of positions x positions.
        heads = [x.transpose(-1, -2).contiguous() for x in heads]  # (b, heads, positions, d)
        attended = F.scaled_dot_product_attention(*heads)
        return attended.transpose(-1, -2).reshape(q.shape)


def rotate(x: Tensor, top: int, left: int, head_dim: int) -> Tensor:
    """Rotary encoding of rows (first half of each head) and columns (second half), counted in the whole frame.

    Args:
        x: [b, c, t, h, w] whose first position is row `top`, column `left` of the frame.
    """
    height, width = x.shape[-2:]
    pairs = head_dim // 4
    frequencies = ROTARY_BASE ** (-torch.arange(pairs, device=x.device, dtype=torch.float64) / pairs)
    rows = torch.arange(top, top + height, device=x.device, dtype=torch.float64)[:, None].expand(height, width)
    columns = torch.arange(left, left + width, device=x.device, dtype=torch.float64)[None, :].expand(height, width)
    angles = torch.stack([rows, columns])[:, None] * frequencies[:, None, None]  # (2, pairs, h, w)
    cos, sin = angles.cos().to(x.dtype).unsqueeze(2), angles.sin().to(x.dtype).unsqueeze(2)  # over t
    a, b = x.unflatten(1, (-1, 2, 2, pairs)).unbind(3)  # (b, heads, 2, pairs, t, h, w) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=3).reshape(x.shape)


def _squares(start: int, length: int, side: int) -> list[tuple[int, int]]:
    """start .. start + length cut at the multiples of `side`."""
    cuts = [start, *range((start // side + 1) * side, start + length, side), start + length]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def _aligned(position: int, side: int) -> slice:
    """The whole square that a position lies in."""
    begin = position // side * side
    return slice(begin, begin + side)
