"""Which way a clip moves: the shift between two frames, and the camera pan it means."""

import torch
from torch import Tensor

# A camera that pans left shows what was on the left: the content moves right.
_PANS = {("x", 1): "left", ("x", -1): "right", ("y", 1): "up", ("y", -1): "down"}
# An overlap smaller than this share of the frame says little about the shift.
_MIN_OVERLAP = 0.4


def global_shift(first: Tensor, second: Tensor, max_shift: int, step: int = 2) -> tuple[int, int]:
    """Distance that the content moves from one frame to another: (rows down, columns right), in pixels.

    The shift whose overlap correlates best (zero-mean normalised correlation of grey values, every shift up to
    `max_shift` tried), which bears blur and other brightness.

    Args:
        first, second: uint8 or float [h, w, 3].
        step: frames are averaged over step x step pixels first; the shift is a multiple of it.
    """
    grey = torch.stack([first, second]).float().mean(-1)[:, None]
    small = torch.nn.functional.avg_pool2d(grey, step)[:, 0]
    height, width = small.shape[1:]
    reach = max_shift // step
    shifts = [
        (dy, dx)
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
        if (height - abs(dy)) * (width - abs(dx)) >= _MIN_OVERLAP * height * width
    ]
    best = max(shifts, key=lambda shift: _correlation(small[0], small[1], *shift))
    return best[0] * step, best[1] * step


def pan_direction(clip: Tensor, max_shift: int) -> str:
    """The pan of a clip uint8 [f, h, w, 3], from its first to its last frame: left, right, up, down or none."""
    dy, dx = global_shift(clip[0], clip[-1], max_shift)
    if dy == dx == 0:
        return "none"
    axis, amount = ("x", dx) if abs(dx) >= abs(dy) else ("y", dy)
    return _PANS[axis, 1 if amount > 0 else -1]


def _correlation(first: Tensor, second: Tensor, dy: int, dx: int) -> float:
    """Correlation of first[y, x] with second[y + dy, x + dx] where both exist."""
    height, width = first.shape
    a = first[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
    b = second[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm() + 1e-6)).item()
