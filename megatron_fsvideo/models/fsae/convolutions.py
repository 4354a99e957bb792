"""3x3x3 convolutions that differ in the frames they see (paper sections 2.2.1, 2.2.3).

|  | sees | used by |
|---|---|---|
| `CausalConv3d` | two past frames | encoder, causal decoder |
| `CenterConv3d` | one past, one future frame | FSAE-Standard's decoder |
| `GroupCausalConv3d` | one past frame, and the future inside its group of frames | FSAE-Lite's decoder |

All have the same parameters. Where a frame is missing in time, its neighbour is repeated; space is padded with zeros.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.streaming import Stream, at_start

KERNEL_SIZE = 3

ConvKind = Callable[..., "VideoConv3d"]
"""One of the three, its group given: called with channels and options."""


class VideoConv3d(nn.Module):
    """Base of the three kinds: parameters, their initial values, and the case of a single frame.

    Args:
        stride: stride in time and in space.
        depthwise: one filter per channel (`in_channels` must equal `out_channels`).
        init_scale: factor on the initial weights.
    """

    kernel_size = KERNEL_SIZE

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: tuple[int, int] = (1, 1),
        depthwise: bool = False,
        bias: bool = True,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.groups = in_channels if depthwise else 1
        self.stride = stride
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // self.groups, KERNEL_SIZE, KERNEL_SIZE, KERNEL_SIZE)
        )
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        with torch.no_grad():
            self.weight.mul_(init_scale)

    def _convolve(self, frames: Tensor, weight: Tensor | None = None) -> Tensor:
        """Frames that are already padded in time -> output without padding in time."""
        return F.conv3d(
            frames,
            self.weight if weight is None else weight,
            self.bias,
            stride=(self.stride[0], self.stride[1], self.stride[1]),
            padding=(0, 1, 1),
            groups=self.groups,
        )

    def _single_frame(self, x: Tensor) -> Tensor:
        """The result for a frame without neighbours at a third of the work: every tap sees that frame."""
        y = F.conv2d(
            x.squeeze(2), self.weight.sum(dim=2), self.bias, stride=self.stride[1], padding=1, groups=self.groups
        )
        return y.unsqueeze(2)


class CausalConv3d(VideoConv3d):
    """Output t sees frames t-2, t-1, t; before the start, frame 0 repeats.

    With `stride` 2 in time, output i sees frames 2i-2 .. 2i: a first chunk has an odd number of frames, later ones an
    even number, and only one frame is carried over.
    """

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t / time stride (rounded up at the start), h', w']."""
        before = None
        if stream is not None:
            x, before = stream.look_back(self, x, KERNEL_SIZE - self.stride[0])
        if before is None and x.shape[2] == 1:
            return self._single_frame(x)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, KERNEL_SIZE - 1, -1, -1)
        return self._convolve(torch.cat([before, x], dim=2))


class CenterConv3d(VideoConv3d):
    """Output t sees frames t-1, t, t+1; at both ends of the video (or tile) its own frame repeats."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t, h, w]."""
        before = after = None
        if stream is not None:
            x, before, after = stream.look_around(x)
        if before is None and after is None and x.shape[2] == 1:
            return self._single_frame(x)
        before = x[:, :, :1] if before is None else before
        after = x[:, :, -1:] if after is None else after
        return self._convolve(torch.cat([before, x, after], dim=2))


class GroupCausalConv3d(VideoConv3d):
    """Output t sees t-1, t, t+1 but nothing after its group: the group's last frame repeats instead.

    Groups are frame 0, then `group` frames each: the frames of one latent at this layer's rate, so a video decoded
    latent by latent needs the one frame before each. (IV-VAE's group causal convolution, with replication at the end.)

    Args:
        group: frames per latent at this layer's rate: 1, 2 or 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        group: int,
        depthwise: bool = False,
        bias: bool = True,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, depthwise=depthwise, bias=bias, init_scale=init_scale)
        self.group = group

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t, h, w]; t is a multiple of `group`, at the start plus 1."""
        before = None
        if stream is not None:
            x, before = stream.look_back(self, x, 1)
        if not at_start(stream):
            parts = self._groups(x[:, :, :1] if before is None else before, x)
        elif x.shape[2] == 1:
            parts = [self._single_frame(x)]
        else:
            parts = [self._single_frame(x[:, :, :1]), *self._groups(x[:, :, :1], x[:, :, 1:])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _groups(self, before: Tensor, x: Tensor) -> Sequence[Tensor]:
        """Whole groups after the frame `before` them -> outputs [b, c, t, h, w], one after the other in time."""
        if self.group == 1:
            # Taps 1 and 2 both see the frame itself.
            weight = torch.stack([self.weight[:, :, 0], self.weight[:, :, 1] + self.weight[:, :, 2]], dim=2)
            return [self._convolve(torch.cat([before, x], dim=2), weight)]
        groups = x.unflatten(2, (-1, self.group)).transpose(1, 2)  # (b, n, c, group, h, w)
        last = groups[:, :, :, -1:]
        left = torch.cat([before.unsqueeze(1), last[:, :-1]], dim=1)
        padded = torch.cat([left, groups, last], dim=3)  # (b, n, c, group + 2, h, w)
        return self._convolve(padded.flatten(0, 1)).unflatten(0, padded.shape[:2]).unbind(1)
