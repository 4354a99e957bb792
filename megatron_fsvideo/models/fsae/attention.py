"""EfficientViT block of the inner stages: linear attention within each frame, then a gated convolution (section 2.2).

The attention "operates only on height and width"; only the depthwise convolution of the gated part sees time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.layers import CausalConv3d
from megatron_fsvideo.models.fsae.streaming import StreamCache

ATTENTION_EPSILON = 1e-15
GATED_EXPANSION = 4


class FrameLinearAttention(nn.Module):
    """Multi-scale ReLU linear attention over the positions of one frame (EfficientViT's LiteMLA).

    Heads see q, k, v and a second set of them averaged over 5x5 neighbourhoods by learned depthwise weights.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(
                f"attention_head_dim {head_dim} does not divide the width {channels} of an attention stage"
            )
        self.head_dim = head_dim
        groups = 3 * channels // head_dim
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.neighbours = nn.Conv2d(3 * channels, 3 * channels, 5, padding=2, groups=3 * channels, bias=False)
        self.mix_neighbours = nn.Conv2d(3 * channels, 3 * channels, 1, groups=groups, bias=False)
        self.out = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Frames [n, c, h, w] -> [n, c, h, w]."""
        n, _, h, w = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.mix_neighbours(self.neighbours(qkv))], dim=1)  # (n, 6c, h, w)
        q, k, v = qkv.reshape(n, -1, 3 * self.head_dim, h * w).chunk(3, dim=2)  # each (n, heads, d, hw)
        attended = relu_linear_attention(q, k, v).to(x.dtype)
        return self.out(attended.reshape(n, -1, h, w))


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_j relu(q_i).relu(k_j) v_j / sum_j relu(q_i).relu(k_j), for q, k, v [n, heads, d, l]; linear in l.

    At least fp32: the sums run over all positions, and epsilon is far below bfloat16's range of precision.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = F.relu(q.to(wide)), F.relu(k.to(wide)), v.to(wide)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # the last row sums the weights
        attended = (v @ k.transpose(-1, -2)) @ q  # (n, heads, d + 1, l)
        return attended[:, :, :-1] / (attended[:, :, -1:] + ATTENTION_EPSILON)


class GatedConv(nn.Module):
    """EfficientViT's GLUMBConv, causal in time: 1x1, silu, depthwise 3x3x3, gate, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = GATED_EXPANSION * channels
        self.expand = nn.Conv3d(channels, 2 * hidden, 1)
        self.depthwise = CausalConv3d(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.project = nn.Conv3d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        value, gate = self.depthwise(F.silu(self.expand(x)), cache).chunk(2, dim=1)
        return self.project(value * F.silu(gate))


class EViTBlock(nn.Module):
    """x + norm(attention of each frame), then x + norm(gated causal convolution)."""

    def __init__(self, channels: int, head_dim: int, attention_norm: nn.Module, gated_norm: nn.Module) -> None:
        super().__init__()
        self.attention = FrameLinearAttention(channels, head_dim)
        self.attention_norm = attention_norm
        self.gated = GatedConv(channels)
        self.gated_norm = gated_norm

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        attended = self.attention_norm(self.attention(frames))
        x = x + attended.reshape(b, t, c, h, w).transpose(1, 2)
        return x + self.gated_norm(self.gated(x, cache))
