"""Intrinsic dimension: Gaussians of known dimension, the likelihood written out, DADApy, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from megatron_fsvideo.evaluation.gride import (
    drop_duplicates,
    intrinsic_dimension,
    neighbor_distances,
    table_row,
)


def gaussian(dimension: int, count: int, features: int = 48, seed: int = 0) -> Tensor:
    """[count, features]: a Gaussian in a random subspace, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(features, dimension, generator=generator, dtype=torch.float64))
    shift = 10 * torch.randn(features, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ basis.T + shift


@pytest.mark.parametrize("dimension", (2, 5))
def test_property_32_gaussians_of_known_dimension_at_all_scales(dimension):
    estimates = intrinsic_dimension(gaussian(dimension, 4000))
    assert [estimate.neighbors for estimate in estimates] == [2, 4, 8, 16, 32, 64]
    for estimate in estimates:
        assert estimate.dimension == pytest.approx(dimension, rel=0.05)
    distances = [estimate.distance for estimate in estimates]
    assert distances == sorted(distances)


def test_ten_dimensions_at_the_scales_where_the_density_is_constant():
    # 64 of 8000 neighbours in ten dimensions lie where the density has changed: a lower estimate.
    fine = intrinsic_dimension(gaussian(10, 8000), max_neighbors=8)
    for estimate in fine:
        assert estimate.dimension == pytest.approx(10, rel=0.05)


def test_estimate_is_the_largest_likelihood():
    points = gaussian(3, 300, features=7)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values[:, 1:]
    for estimate in intrinsic_dimension(points, max_neighbors=16):
        n2 = estimate.neighbors
        n1 = n2 // 2
        mu = distances[:, n2 - 1] / distances[:, n1 - 1]

        def likelihood(d: float, mu: Tensor = mu, n1: int = n1, n2: int = n2) -> float:
            beta = math.lgamma(n2 - n1) + math.lgamma(n1) - math.lgamma(n2)
            density = math.log(d) + (n2 - n1 - 1) * (mu**d - 1).log() - ((n2 - 1) * d + 1) * mu.log() - beta
            return float(density.sum()) - math.log(d)  # N - 1 points in d^N

        best, step = estimate.dimension, 1e-3
        here, below, above = (likelihood(d) for d in (best, best - step, best + step))
        assert here > below and here > above
        # The vertex of the parabola through the three, and its curvature.
        curvature = (below - 2 * here + above) / step**2
        assert abs((below - above) / (2 * step) / curvature) < 1e-5
        assert estimate.error == pytest.approx((-curvature) ** -0.5, rel=1e-2)


def test_the_density_integrates_to_one():
    # The formula of the module's docstring, for one scale: what the likelihood above is made of.
    d, n1, n2 = 3.0, 4, 8
    mu = torch.linspace(1 + 1e-9, 60, 2_000_001, dtype=torch.float64)
    beta = math.gamma(n2 - n1) * math.gamma(n1) / math.gamma(n2)
    density = d * (mu**d - 1) ** (n2 - n1 - 1) / (mu ** ((n2 - 1) * d + 1) * beta)
    assert float(torch.trapezoid(density, mu)) == pytest.approx(1, abs=1e-6)


def test_neighbor_distances_are_exact_far_from_the_origin():
    points = gaussian(4, 700, features=9) * 1e-3 + 1e3
    expected = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values[:, 1:6]
    assert torch.allclose(neighbor_distances(points, 5), expected, rtol=1e-9, atol=0)


def test_does_not_depend_on_scale_shift_or_order():
    points = gaussian(3, 400)
    expected = [estimate.dimension for estimate in intrinsic_dimension(points)]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    moved = intrinsic_dimension(points[order] * 37 - 5)
    assert [estimate.dimension for estimate in moved] == pytest.approx(expected, rel=1e-9)


def test_finest_scale_has_the_closed_form_of_two_neighbours():
    points = gaussian(4, 500)
    near, far = neighbor_distances(points, 2).T
    (estimate,) = intrinsic_dimension(points, max_neighbors=2)
    assert estimate.dimension == pytest.approx(499 / float((far / near).log().sum()), rel=1e-9)


def test_near_duplicates_do_not_count():
    points = gaussian(4, 500)
    near = torch.cat([points, points[:3] + 1e-9])
    estimate, clean = (intrinsic_dimension(p, max_neighbors=2)[0] for p in (near, points))
    assert (estimate.num_points, clean.num_points) == (497, 500)
    assert estimate.dimension == pytest.approx(clean.dimension, rel=0.02)


def test_duplicates_are_named_and_can_be_dropped():
    points = gaussian(3, 200)
    doubled = torch.cat([points, points[:7]])
    with pytest.raises(ValueError, match="14 of 207 points have a duplicate"):
        intrinsic_dimension(doubled)
    assert torch.equal(drop_duplicates(doubled), points)


def test_too_few_points_are_refused_with_numbers():
    with pytest.raises(ValueError, match="60 points have at most 59 neighbours each, asked for 64: give at least 65"):
        intrinsic_dimension(gaussian(3, 60))
    assert len(intrinsic_dimension(gaussian(3, 65))) == 6


def test_refuses_what_has_no_dimension():
    with pytest.raises(ValueError, match="power of two"):
        intrinsic_dimension(gaussian(2, 20), max_neighbors=6)
    damaged = gaussian(2, 20)
    damaged[3, 4] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 points have values that are not finite"):
        intrinsic_dimension(damaged, max_neighbors=2)
    with pytest.raises(ValueError, match="equally far away"):
        intrinsic_dimension(torch.eye(8, dtype=torch.float64), max_neighbors=4)
    # Ties between some points are data.
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0)).double()
    mixed = torch.cat([grid, 0.3 + 19 * torch.rand(400, 2, generator=torch.Generator().manual_seed(0))])
    assert all(1 < estimate.dimension < 3 for estimate in intrinsic_dimension(mixed))


def test_table_row_reads_like_table_1():
    estimates = intrinsic_dimension(gaussian(2, 100), max_neighbors=4)
    text = table_row("latents", estimates)
    assert text == f"latents | [{estimates[0].dimension:.2f}, {estimates[1].dimension:.2f}]"


@pytest.mark.parametrize(("dimension", "count"), ((1, 500), (2, 500), (5, 2000), (10, 1000)))
def test_property_32_equals_dadapy(dimension, count):
    dadapy = pytest.importorskip("dadapy", exc_type=ImportError)
    points = gaussian(dimension, count)
    data = dadapy.Data(coordinates=points.numpy(), verbose=False)
    dimensions, errors, _ = data.return_id_scaling_gride(range_max=64, d0=0.001, d1=1000, eps=1e-7)
    ours = intrinsic_dimension(points)
    assert [estimate.dimension for estimate in ours] == pytest.approx(list(dimensions), abs=5e-4)
    assert [estimate.error for estimate in ours] == pytest.approx(list(errors), rel=1e-2)
