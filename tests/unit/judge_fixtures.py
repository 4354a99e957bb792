"""Judging networks with random weights whose outputs tell clips apart."""

import torch
from torch import Tensor, nn

from megatron_fsvideo.models.frozen.i3d import I3D


def random_i3d() -> I3D:
    """Norms that keep the signal alive through all layers, a classifier whose logits are of order one or more."""
    torch.manual_seed(0)
    model = I3D().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.1, 0.3)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(std=0.1)
        elif name == "logits.conv3d.weight":
            tensor.mul_(20)
    return model


class QuickLogits(nn.Module):
    """400 random features of a clip in the place of I3D's logits, which take a second each on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(3 * 4 * 4, 400, generator=torch.Generator().manual_seed(0))

    def forward(self, video: Tensor) -> Tensor:
        """[b, 3, f, h, w] -> [b, 400]."""
        return nn.functional.adaptive_avg_pool3d(video, (1, 4, 4)).flatten(1) @ self.weight
