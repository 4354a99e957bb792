"""The 3D multiscale discriminator (paper section 2.2.1): PatchGANs on shrunken videos.

pix2pixHD's scheme with 3D kernels: every scale has a network of its own and sees the video averaged to 1, 1/2, 1/4 of
its frames and sides. There is no normalisation, because R1 asks for the gradient of each sample alone, and no
attention, whose fused kernels have no second derivative. An image is a video of one frame.
"""

import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = (3, 4, 4)
TEMPORAL_LAYERS = 2
"""The first layers, which halve time as well as space."""
MAX_WIDTH_FACTOR = 8
NEGATIVE_SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Convolutions from a video to one logit per patch.

    Args:
        width: channels after the first layer; they double up to 8 times that.
        num_layers: layers that halve the sides; two more follow at the last resolution.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        widths = [3] + [width * min(2**k, MAX_WIDTH_FACTOR) for k in range(num_layers + 1)] + [1]
        strides = [(2 if k < TEMPORAL_LAYERS else 1, 2, 2) for k in range(num_layers)] + [(1, 1, 1)] * 2
        self.layers = nn.ModuleList(
            nn.Conv3d(before, after, KERNEL, stride, padding=1)
            for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )

    def forward(self, video: Tensor) -> Tensor:
        """[b, 3, f, h, w] -> logits [b, 1, f', h', w'], large for real patches."""
        x = video
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE)
        return self.layers[-1](x)


class Discriminator(nn.Module):
    """One PatchDiscriminator per scale (the defaults have 24.9M parameters).

    Args:
        width: channels after each network's first layer.
        num_scales: networks, each on half the frames and sides of the one before.
        num_layers: of each network, as in PatchDiscriminator.
    """

    def __init__(self, width: int = 64, num_scales: int = 3, num_layers: int = 3) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(width, num_layers) for _ in range(num_scales))

    def forward(self, video: Tensor) -> list[Tensor]:
        """[b, 3, f, h, w] in [-1, 1] -> logits [b, 1, f_k, h_k, w_k] of each scale k.

        Raises:
            ValueError: the video has no patch at the coarsest scale.
        """
        if min(video.shape[3:]) < self.smallest_side:
            raise ValueError(
                f"the discriminator needs sides of at least {self.smallest_side} pixels, got {video.shape[3]}x"
                f"{video.shape[4]}; train on larger crops, or lower discriminator_scales or discriminator_layers"
            )
        logits = []
        for index, network in enumerate(self.scales):
            if index:
                video = shrink(video)
            logits.append(network(video))
        return logits

    @property
    def smallest_side(self) -> int:
        """Rows and columns that leave one patch at the coarsest scale."""
        side = 3  # the two layers without stride take one row each
        for _ in range(len(self.scales[0].layers) - 2):
            side *= 2
        for _ in self.scales[1:]:
            side = 2 * side - 1
        return side


def shrink(video: Tensor) -> Tensor:
    """Half the frames and sides, by averages of 3x3x3 in which padding does not count."""
    # Pooling one frame over three raises, with padding too.
    frames = 1 if video.shape[2] == 1 else 3
    kernel, padding = (frames, 3, 3), (frames // 2, 1, 1)
    return F.avg_pool3d(video, kernel, (2, 2, 2), padding, count_include_pad=False)
