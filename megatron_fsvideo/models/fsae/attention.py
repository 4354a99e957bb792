"""EfficientViT block (DC-AE's `EfficientViTBlock`): multi-scale ReLU linear attention per frame, gated MLP.

"Attention layers operate only on height and width" (paper section 2.2.1): frames are folded into the batch, and only
the depthwise convolution of the MLP sees other frames.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, ConvKind
from megatron_fsvideo.models.fsae.layers import PixelNorm
from megatron_fsvideo.models.fsae.streaming import Stream

MULTI_SCALE_KERNEL = 5
MLP_RATIO = 4


class LinearAttention(nn.Module):
    """ReLU linear attention over the positions of one frame, at two scales of queries, keys and values.

    Source: `LiteMLA` of EfficientViT (mit-han-lab/efficientvit), weights in its order: heads of (query, key, value).
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        heads = channels // head_dim
        self.head_dim = head_dim
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.scale_depthwise = nn.Conv2d(
            3 * channels,
            3 * channels,
            MULTI_SCALE_KERNEL,
            padding=MULTI_SCALE_KERNEL // 2,
            groups=3 * channels,
            bias=False,
        )
        self.scale_pointwise = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False)
        self.out = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[n, c, h, w] -> the same shape; n counts frames."""
        n, _, h, w = frames.shape
        qkv = self.qkv(frames)
        qkv = torch.cat([qkv, self.scale_pointwise(self.scale_depthwise(qkv))], dim=1)  # (n, 2 * 3c, h, w)
        q, k, v = qkv.reshape(n, -1, 3 * self.head_dim, h * w).chunk(3, dim=2)  # (n, 2 * heads, d, hw) each
        attended = relu_linear_attention(q, k, v).to(qkv.dtype)
        return self.out(attended.reshape(n, -1, h, w))


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = 1e-15) -> Tensor:
    """softmax replaced by relu(q)relu(k): linear in the number of positions. [n, heads, d, positions], out likewise.

    In fp32 at least: sums over thousands of positions and the tiny epsilon do not survive bf16.
    """
    # The meta device, on which sizes and FLOPs are counted, has no autocast.
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        q, k = F.relu(q), F.relu(k)
        numerator = (v @ k.transpose(-1, -2)) @ q  # (n, heads, d, positions)
        denominator = k.sum(dim=-1, keepdim=True).transpose(-1, -2) @ q  # (n, heads, 1, positions)
        return numerator / (denominator + epsilon)


class GatedMLP(nn.Module):
    """1x1 expansion, depthwise 3x3x3, gate, 1x1 projection (DC-AE's `GLUMBConv`)."""

    def __init__(self, channels: int, conv: ConvKind = CausalConv3d) -> None:
        super().__init__()
        inner = MLP_RATIO * channels
        self.expand = nn.Conv3d(channels, 2 * inner, 1)
        self.depthwise = conv(2 * inner, 2 * inner, depthwise=True)
        self.project = nn.Conv3d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape."""
        h, gate = self.depthwise(F.silu(self.expand(x)), stream).chunk(2, dim=1)
        return self.project(h * F.silu(gate))


class EViTBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        attention_norm: PixelNorm,
        mlp_norm: PixelNorm,
        conv: ConvKind = CausalConv3d,
    ) -> None:
        super().__init__()
        self.attention = LinearAttention(channels, head_dim)
        self.attention_norm = attention_norm
        self.mlp = GatedMLP(channels, conv)
        self.mlp_norm = mlp_norm

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape."""
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        attended = self.attention(frames).reshape(b, t, c, h, w).transpose(1, 2)
        x = x + self.attention_norm(attended)
        return x + self.mlp_norm(self.mlp(x, stream))
