"""Per-sample losses on the velocity (paper section 3: pseudo-Huber).

A sample's error is summed over all its elements before the root, wherever they live: the caller adds the squared
errors of all ranks that share a sample, then calls these functions.
"""

import torch
from torch import Tensor


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences of each sample [b], fp32; inputs [b, ...]."""
    return (prediction.float() - target.float()).square().flatten(1).sum(1)


def pseudo_huber(mse: Tensor, huber_c: float) -> Tensor:
    """Pseudo-Huber loss of each sample from its mean squared error [b].

    2 c (sqrt(mse + c^2) - c): the squared error where it is small, 2 c times the root-mean-square error where it is
    large, so that no sample's gradient outgrows the others'. `huber_c` is in units of the per-element error; Song &
    Dhariwal 2023 (iCT) and Lee et al. 2024 scale the same loss differently with the number of elements.
    """
    return 2 * huber_c * (torch.sqrt(mse + huber_c**2) - huber_c)


def per_sample_loss(sum_squared_errors: Tensor, num_elements: int, loss_type: str, huber_c: float) -> Tensor:
    """Loss of each sample [b] from its squared error summed over all `num_elements` of its elements.

    Raises:
        ValueError: a loss type other than "pseudo_huber" and "mse".
    """
    mse = sum_squared_errors / num_elements
    if loss_type == "pseudo_huber":
        return pseudo_huber(mse, huber_c)
    if loss_type == "mse":
        return mse
    raise ValueError(f"loss_type is pseudo_huber or mse, got {loss_type!r}")
