"""LPIPS of a few frames at a time (paper section 2.2.1: "temporal slicing for LPIPS calculation").

The features of VGG16 take many times a video's memory, but frames do not meet in them: the gradient with respect to
the reconstruction is made slice by slice, each slice's features are freed, and only a gradient of the video's size
waits for the backward pass.
"""

import torch
from torch import Tensor

from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss


def sliced_perceptual_loss(
    perceptual: PerceptualLoss, reconstruction: Tensor, video: Tensor, frames_per_slice: int
) -> Tensor:
    """`perceptual(reconstruction, video)` with the memory of `frames_per_slice` frames; equal value and gradient.

    Only `reconstruction` gets a gradient, and only a first one.

    Args:
        reconstruction, video: [b, 3, f, h, w] in [-1, 1].
        frames_per_slice: 0 takes all frames at once.
    """
    b, _, num_frames, _, _ = video.shape
    if frames_per_slice <= 0 or frames_per_slice >= num_frames:
        return perceptual(reconstruction, video)
    needs_gradient = reconstruction.requires_grad and torch.is_grad_enabled()
    value = torch.zeros((), device=video.device)
    gradients = []
    for ours, theirs in zip(
        reconstruction.detach().split(frames_per_slice, dim=2), video.split(frames_per_slice, dim=2), strict=True
    ):
        ours.requires_grad_(needs_gradient)
        loss = perceptual.per_frame(ours, theirs).sum() / (b * num_frames)
        if needs_gradient:
            gradients += torch.autograd.grad(loss, ours)
        value += loss.detach()
    return _KnownGradient.apply(reconstruction, value, torch.cat(gradients, dim=2)) if needs_gradient else value


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to `x` has been computed already."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
