"""Intrinsic dimension from ratios of neighbour distances: Gride (Denti, Doimo, Laio, Mira 2022, arXiv:2104.13832).

Around a point of a d-dimensional set of locally constant density, the ratio mu of the distances to its n2-th and n1-th
neighbour has the density

    d (mu^d - 1)^(n2 - n1 - 1) / (mu^((n2 - 1) d + 1) B(n2 - n1, n1)),    mu > 1,

whatever the density is. The estimate is the d of largest likelihood over all points, at scales n1 = 1, 2, 4, ... with
n2 = 2 n1: a larger n2 looks at a coarser scale. Table 1 of the paper has n2 = 2, 4, ..., 64.

Two details are DADApy 0.3.4's, which the paper used, so that numbers compare: N - 1 points in the likelihood's d^N (for
n1 = 1 this makes the estimate unbiased), and ratios beyond any plausible tail (near-duplicates) are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TABLE_1_NEIGHBORS = 64
"""Neighbours up to which the paper's Table 1 goes."""
# Candidates beyond the neighbours asked for: rounding in the matrix product may swap distances that are almost equal.
_SPARE_CANDIDATES = 16
_ROWS_AT_ONCE = 256
_DIFFERENCE_ELEMENTS = 1 << 24
_LARGEST_DIMENSION = 1e6
# A ratio this many times as far above the median as the 95th percentile is.
_TAIL = 20


@dataclass(frozen=True)
class ScaleEstimate:
    """Intrinsic dimension at one scale.

    Attributes:
        neighbors: n2; n1 is half of it.
        dimension: the estimate of largest likelihood.
        error: its standard error, from the curvature of the likelihood (points count as independent).
        distance: mean over the points of the mean of the two distances: how coarse the scale is.
        num_points: points whose ratio counted.
    """

    neighbors: int
    dimension: float
    error: float
    distance: float
    num_points: int


def intrinsic_dimension(points: Tensor, max_neighbors: int = TABLE_1_NEIGHBORS) -> list[ScaleEstimate]:
    """Gride at n2 = 2, 4, 8, ..., `max_neighbors`.

    Args:
        points: [n, features], finite and without duplicates (`drop_duplicates`).
        max_neighbors: a power of two, at least 2; smaller than n.

    Raises:
        ValueError: too few points, values that are not finite, duplicates, or neighbours all equally far.
    """
    if points.ndim != 2:
        raise ValueError(f"points must be [number, features], got {list(points.shape)}")
    check_number(len(points), max_neighbors)
    distances = neighbor_distances(points, max_neighbors)
    if (zero := int((distances[:, 0] == 0).sum())) > 0:
        raise ValueError(f"{zero} of {len(points)} points have a duplicate, whose ratio is infinite: drop duplicates")
    estimates = []
    n2 = 2
    while n2 <= max_neighbors:
        estimates.append(_estimate(distances[:, n2 // 2 - 1], distances[:, n2 - 1], n2))
        n2 *= 2
    return estimates


def check_number(num_points: int, max_neighbors: int) -> None:
    """Refuse fewer points than have that many neighbours, and numbers of neighbours that are no power of two.

    Raises:
        ValueError: with the numbers.
    """
    if max_neighbors < 2 or max_neighbors & (max_neighbors - 1):
        raise ValueError(f"max_neighbors must be a power of two and at least 2, got {max_neighbors}")
    if num_points <= max_neighbors:
        raise ValueError(
            f"{num_points} points have at most {max(0, num_points - 1)} neighbours each, asked for {max_neighbors}: "
            f"give at least {max_neighbors + 1} points (the estimate's relative error falls as 1 / sqrt(points)), or "
            "fewer neighbours"
        )


def drop_duplicates(points: Tensor) -> Tensor:
    """The distinct rows of [n, features], in the order of their first appearance."""
    _, inverse = torch.unique(points, dim=0, return_inverse=True)
    rows = torch.arange(len(points))
    first = torch.full((int(inverse.max()) + 1,), len(points)).scatter_reduce(0, inverse, rows, "amin")
    return points[first.sort().values]


def neighbor_distances(points: Tensor, count: int) -> Tensor:
    """Euclidean distances of each point to its `count` nearest others, ascending: [n, features] -> [n, count], fp64.

    Raises:
        ValueError: values that are not finite.
    """
    points = points.double()
    if not bool(torch.isfinite(points).all()):
        bad = int((~torch.isfinite(points)).any(dim=1).sum())
        raise ValueError(f"{bad} of {len(points)} points have values that are not finite")
    points = points - points.mean(dim=0)
    norms = points.square().sum(dim=1)
    taken = min(len(points) - 1, count + _SPARE_CANDIDATES)
    found = []
    for start in range(0, len(points), _ROWS_AT_ONCE):
        rows = points[start : start + _ROWS_AT_ONCE]
        squared = norms - 2 * rows @ points.T  # without the row's own norm, which changes no order
        squared[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        candidates = squared.topk(taken, dim=1, largest=False).indices
        found.append(_exact_distances(rows, points, candidates)[:, :count])
    return torch.cat(found)


def _exact_distances(rows: Tensor, points: Tensor, candidates: Tensor) -> Tensor:
    """Distances of row k to the points `candidates[k]`, ascending: differences first, which do not cancel."""
    at_once = max(1, _DIFFERENCE_ELEMENTS // (candidates.shape[1] * points.shape[1]))
    parts = []
    for some, chosen in zip(rows.split(at_once), candidates.split(at_once), strict=True):
        parts.append((points[chosen] - some[:, None]).square().sum(dim=2).sqrt())
    return torch.cat(parts).sort(dim=1).values


def _estimate(near: Tensor, far: Tensor, n2: int) -> ScaleEstimate:
    """The estimate from distances to the n2/2-th and the n2-th neighbour, each [n]."""
    n1 = n2 // 2
    ratios = far / near
    high, median = ratios.quantile(torch.tensor([0.95, 0.5], dtype=ratios.dtype))
    # Not where 95 % are equal: the few others are then all there is to see.
    logs = (ratios[ratios < median + _TAIL * (high - median)] if high > median else ratios).log()
    if not bool((logs > 0).any()):
        raise ValueError(f"all points have their neighbours {n1} and {n2} equally far away: no dimension fits")
    low, high = 0.0, 1.0
    while _slope(high, logs, n1, n2) > 0:
        low, high = high, 2 * high
        if high > _LARGEST_DIMENSION:
            raise ValueError(f"the likelihood still rises at dimension {low:.3g}, with {n2} neighbours")
    for _ in range(60):  # to fp64's precision; the slope falls monotonically
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(middle, logs, n1, n2) > 0 else (low, middle)
    dimension = (low + high) / 2
    distance = float((near + far).mean() / 2)
    return ScaleEstimate(n2, dimension, _standard_error(dimension, logs, n1, n2), distance, len(logs))


def _slope(d: float, logs: Tensor, n1: int, n2: int) -> float:
    """Derivative of the log likelihood by d; `logs` are ln mu."""
    # ln mu / (1 - mu^-d), which tends to 1 / d where the two distances are equal.
    exact = logs / -torch.expm1(-d * logs)
    terms = torch.where(logs * d > 1e-12, exact, 1 / d)
    return float((len(logs) - 1) / d + (n2 - n1 - 1) * terms.sum() - (n2 - 1) * logs.sum())


def _standard_error(d: float, logs: Tensor, n1: int, n2: int) -> float:
    """One over the root of the observed Fisher information."""
    x = d * logs
    # (ln mu)^2 mu^-d / (1 - mu^-d)^2 = (x / (2 sinh(x / 2)))^2 / d^2
    terms = torch.where(x > 1e-6, (x / (2 * torch.sinh(x / 2))).square(), 1.0)
    information = (len(logs) + (n2 - n1 - 1) * terms.sum()) / d**2
    return float(information**-0.5)


def table_row(name: str, estimates: Sequence[ScaleEstimate]) -> str:
    """A line in the form of the paper's Table 1: `name | [24.44, 29.60, ...]`."""
    return f"{name} | [{', '.join(f'{estimate.dimension:.2f}' for estimate in estimates)}]"
