"""Per-sample losses on the velocity (paper section 3: pseudo-Huber).

A sample's error is summed over all its elements before the root, wherever they live: the caller adds the squared
errors of all ranks that share a sample, then calls these functions.
"""

import torch
from torch import Tensor

# Of both references, for CIFAR's 3,072 elements.
REFERENCE_HUBER_C = 0.00054


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences of each sample [b], fp32; inputs [b, ...]."""
    return (prediction.float() - target.float()).square().flatten(1).sum(1)


def pseudo_huber(mse: Tensor, huber_c: float) -> Tensor:
    """Pseudo-Huber loss of each sample from its mean squared error [b].

    sqrt(mse + c^2) - c: the root-mean-square error where it is large, a multiple of the squared error where it is
    small, so that no sample's gradient outgrows the others'. This is the loss of Song & Dhariwal 2023 (iCT) and Lee et
    al. 2024 divided by the root of the number of elements. At an error of order 1 its gradient is half the squared
    error's, whatever `huber_c` is: gradient clipping and Adam's epsilon then mean what they mean with `mse`.

    Args:
        huber_c: in units of the root-mean-square error.
    """
    return torch.sqrt(mse + huber_c**2) - huber_c


def huber_constant(loss_type: str, num_elements: int, huber_c: float) -> float:
    """The constant of `pseudo_huber` for samples of `num_elements` elements.

    The references state theirs for the norm of a sample: here it is divided by sqrt(num_elements).

    Args:
        loss_type: "pseudo_huber" takes `huber_c`; "ict" Song & Dhariwal 2023's c = 0.00054 sqrt(num_elements); "rfpp"
            Lee et al. 2024's c = 0.00054 num_elements.

    Raises:
        ValueError: another loss type.
    """
    constants = {
        "pseudo_huber": huber_c,
        "ict": REFERENCE_HUBER_C,
        "rfpp": REFERENCE_HUBER_C * num_elements**0.5,
    }
    if loss_type not in constants:
        raise ValueError(f"loss_type is {', '.join(constants)} or mse, got {loss_type!r}")
    return constants[loss_type]


def loss_of_mse(mse: Tensor, num_elements: int, loss_type: str, huber_c: float) -> Tensor:
    """Loss of each sample [b] from its mean squared error [b].

    Raises:
        ValueError: an unknown loss type.
    """
    if loss_type == "mse":
        return mse
    return pseudo_huber(mse, huber_constant(loss_type, num_elements, huber_c))
