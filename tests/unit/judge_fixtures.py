"""Judging networks with random weights whose outputs tell clips apart."""

import torch

from megatron_fsvideo.evaluation.i3d import I3D


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
