"""The non-saturating logistic GAN loss with R1 (paper section 2.2.1; Goodfellow et al. 2014, Mescheder et al. 2018).

All are means, so that their weights do not depend on the size of the video.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(logits: list[Tensor]) -> Tensor:
    """Mean over scales of softplus(-D(reconstruction)), a scalar.

    Args:
        logits: of the reconstruction, one tensor per scale.
    """
    return torch.stack([F.softplus(-scale.float()).mean() for scale in logits]).mean()


def discriminator_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean over scales of softplus(-D(video)) + softplus(D(reconstruction)), a scalar."""
    of_real = torch.stack([F.softplus(-scale.float()).mean() for scale in real]).mean()
    of_fake = torch.stack([F.softplus(scale.float()).mean() for scale in fake]).mean()
    return of_real + of_fake


def r1_penalty(video: Tensor, logits: list[Tensor]) -> Tensor:
    """Squared gradient of the summed logits with respect to each real video, per patch; the mean over the batch.

    A patch discriminator's squared gradient grows with the number of patches; divided by it, the penalty of a video and
    of one twice as large are alike.

    Args:
        video: [b, 3, f, h, w] with requires_grad; `logits` were computed from it, not under autocast.

    Returns:
        a scalar that has a gradient of its own: add it to the loss, and call backward once.
    """
    num_patches = sum(scale[0].numel() for scale in logits)
    total = torch.stack([scale.sum() for scale in logits]).sum()
    (gradient,) = torch.autograd.grad(total, video, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean() / num_patches
