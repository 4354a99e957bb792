"""Shifts of known size and sign, also under blur, and the pans they stand for."""

import pytest
import torch
import torch.nn.functional as F

from megatron_fsvideo.evaluation.motion import global_shift, pan_direction


def still(seed: int = 0) -> torch.Tensor:
    noise = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(noise, size=(160, 160), mode="bicubic")[0].movedim(0, -1)
    return (image * 40 + 128).clamp(0, 255).to(torch.uint8)


def pan(direction: str, travel: int = 24) -> torch.Tensor:
    dy, dx = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[direction]
    steps = [round(travel * k / 8) for k in range(9)]
    return torch.stack([still()[32 + dy * s : 128 + dy * s, 32 + dx * s : 128 + dx * s] for s in steps])


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (0, 12), (10, 0), (-8, 6), (-20, -24)])
def test_content_that_moves_down_and_right_has_a_positive_shift(dy, dx):
    image = still(1)
    first, second = image[32:128, 32:128], image[32 - dy : 128 - dy, 32 - dx : 128 - dx]
    assert global_shift(first, second, max_shift=32) == (dy, dx)


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_a_window_that_moves_left_pans_left(direction):
    clip = pan(direction)
    assert pan_direction(clip, max_shift=32) == direction
    blurred = F.avg_pool2d(clip.float().movedim(-1, 1), 7, stride=1, padding=3).movedim(1, -1) * 0.8 + 20
    assert pan_direction(torch.cat([clip[:1].float(), blurred[1:]]), max_shift=32) == direction


def test_a_still_clip_pans_nowhere():
    assert pan_direction(still()[None, :96, :96].expand(9, -1, -1, -1), max_shift=32) == "none"
