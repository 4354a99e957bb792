"""Scaling, cropping and the range of frames in memory."""

import torch
import torch.nn.functional as F


def resize_short_side(frames: torch.Tensor, short_side: int) -> torch.Tensor:
    """Scale uint8 `[f, h, w, 3]` so that the short side has `short_side` pixels; the long side is rounded."""
    return _resize(frames, *scaled_size(frames.shape[1], frames.shape[2], short_side))


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale uint8 `[f, h, w, 3]` until it covers height x width, keep the aspect ratio, crop around the centre."""
    source_height, source_width = frames.shape[1:3]
    scale = max(height / source_height, width / source_width)
    scaled = _resize(
        frames,
        max(height, round(source_height * scale)),
        max(width, round(source_width * scale)),
    )
    top, left = (scaled.shape[1] - height) // 2, (scaled.shape[2] - width) // 2
    return scaled[:, top : top + height, left : left + width].contiguous()


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) scaled to a short side; the long side is rounded."""
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def to_unit(frames: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., f, h, w, 3]` -> fp32 `[..., 3, f, h, w]` in [-1, 1]."""
    return frames.movedim(-1, -4).float().div_(127.5).sub_(1.0)


def from_unit(video: torch.Tensor) -> torch.Tensor:
    """`[..., 3, f, h, w]` in [-1, 1] (clamped) -> uint8 `[..., f, h, w, 3]`."""
    return video.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-4, -1).contiguous()


def _resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if frames.shape[1:3] == (height, width):
        return frames
    # Without antialiasing, shrinking a video makes edges flicker, which an autoencoder then has to learn.
    scaled = F.interpolate(frames.movedim(-1, 1), size=(height, width), mode="bilinear", antialias=True)
    return scaled.movedim(1, -1).contiguous()
