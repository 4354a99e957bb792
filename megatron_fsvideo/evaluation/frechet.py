"""Fréchet distance of two sets of features, each taken for a Gaussian: FID's and FVD's formula.

FVD (Unterthiner et al. 2018, arXiv:1812.01717) is this distance between the I3D logits (`i3d.py`) of real and of
reconstructed clips.
"""

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means m and covariances C (n - 1 in the denominator).

    The value is biased upwards for few samples: compare only at equal numbers.

    Args:
        features, reference: [n, d] and [m, d], finite.

    Raises:
        ValueError: other shapes, fewer than two samples, or values that are not finite.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"two sets [n, d] of one d, got {list(features.shape)} and {list(reference.shape)}")
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)} and {len(reference)}")
    if not bool(torch.isfinite(features).all() and torch.isfinite(reference).all()):
        raise ValueError("features have values that are not finite")
    (mean_1, cov_1), (mean_2, cov_2) = _moments(features), _moments(reference)
    shift = (mean_1 - mean_2).square().sum()
    # The product's eigenvalues are those of the symmetric root_1 cov_2 root_1, which rounding cannot make complex.
    root = _symmetric_root(cov_1)
    overlap = _roots(torch.linalg.eigvalsh(root @ cov_2 @ root)).sum()
    return float(shift + cov_1.trace() + cov_2.trace() - 2 * overlap)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _roots(values)) @ vectors.T


def _roots(eigenvalues: Tensor) -> Tensor:
    """Square roots; what is zero but for rounding is zero: fewer samples than features leave many, and roots add up."""
    smallest = eigenvalues.max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return eigenvalues.where(eigenvalues > smallest, 0).sqrt()
