"""Fréchet distance against its closed form and scipy; I3D: structure, names of the published file, what is refused."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fsvideo.evaluation.frechet import frechet_distance
from megatron_fsvideo.models.frozen.i3d import I3D, MIXED, load_i3d, max_pool_same, pad_same, resize_frames
from tests.unit.judge_fixtures import random_i3d


def samples(count: int, dimension: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    shift = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing + shift


def with_moments(mean: Tensor, deviations: Tensor, rotation: Tensor) -> Tensor:
    """Samples whose mean and covariance are exactly these: +-sqrt(n - 1) deviations along each axis."""
    d = len(mean)
    axes = torch.diag(deviations * ((2 * d - 1) / 2) ** 0.5)
    return torch.cat([axes, -axes]) @ rotation.T + mean


def test_closed_form_of_commuting_covariances():
    rotation, _ = torch.linalg.qr(samples(6, 6, 0))
    mean_1, mean_2 = torch.arange(6.0).double(), torch.ones(6).double()
    std_1, std_2 = torch.tensor([1, 2, 3, 0.5, 0, 4]).double(), torch.tensor([2, 2, 1, 0, 0, 3.5]).double()
    expected = (mean_1 - mean_2).square().sum() + (std_1 - std_2).square().sum()
    distance = frechet_distance(with_moments(mean_1, std_1, rotation), with_moments(mean_2, std_2, rotation))
    assert distance == pytest.approx(float(expected), rel=1e-10)


def test_one_dimension():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0], [1.0]])
    std_a, std_b = 2**0.5, 12**0.5
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (std_a - std_b) ** 2, rel=1e-6)


def test_property_31_frechet_of_equal_sets_and_of_shifts():
    a, b = samples(300, 20, 1), samples(200, 20, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a + 3, a) == pytest.approx(9 * 20, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    few = samples(5, 20, 3)  # a singular covariance
    assert frechet_distance(few, a) == pytest.approx(frechet_distance(a, few), rel=1e-9)


def test_equals_the_matrix_square_root():
    a, b = samples(300, 12, 1), samples(250, 12, 2)
    (cov_a, cov_b) = (torch.cov(x.T) for x in (a, b))
    # The product of two covariances has real, positive eigenvalues.
    values, vectors = torch.linalg.eig(cov_a @ cov_b)
    root = ((vectors * values.sqrt()) @ torch.linalg.inv(vectors)).real
    assert torch.allclose(root @ root, cov_a @ cov_b)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_equals_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = samples(500, 40, 1), samples(400, 40, 2)
    cov_a, cov_b = (torch.cov(x.T).numpy() for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_frechet_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples, got 1 and 9"):
        frechet_distance(samples(1, 3, 0), samples(9, 3, 0))
    with pytest.raises(ValueError, match="of one d"):
        frechet_distance(samples(4, 3, 0), samples(4, 2, 0))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(samples(4, 3, 0) / 0, samples(4, 3, 0))


@pytest.fixture(scope="module")
def i3d() -> I3D:
    return random_i3d()


def test_i3d_has_the_published_names(i3d):
    units = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
    for block in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split():
        units += [f"Mixed_{block}.{branch}" for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]
    parts = ("conv3d.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    expected = {f"{unit}.{part}" for unit in units for part in parts} | {"logits.conv3d.weight", "logits.conv3d.bias"}
    found = {name for name in i3d.state_dict() if not name.endswith("num_batches_tracked")}
    assert found == expected and len(expected) == 287
    shapes = {name: tuple(tensor.shape) for name, tensor in i3d.state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Mixed_3c.b1b.conv3d.weight"] == (192, 128, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.conv3d.weight"] == (128, 832, 1, 1, 1)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)


def test_i3d_has_the_published_size(i3d):
    # By hand, from the paper's Figure 3: convolutions, two numbers a channel for each norm, the classifier.
    weights, norms, channels = 64 * 3 * 343 + 64 * 64 + 192 * 64 * 27, 64 + 64 + 192, 192
    for one, two_in, two, three_in, three, pooled in MIXED.values():
        weights += channels * (one + two_in + three_in + pooled) + 27 * (two_in * two + three_in * three)
        norms += one + two_in + two + three_in + three + pooled
        channels = one + two + three + pooled
    assert channels == 1024
    assert sum(p.numel() for p in i3d.parameters()) == weights + 2 * norms + 1024 * 400 + 400 == 12_697_264


def test_i3d_runs_on_clips_of_the_protocol(i3d):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, 9, 64, 96, generator=generator) * 2 - 1
    logits = i3d(video)
    assert logits.shape == (2, 400) and torch.isfinite(logits).all()
    assert torch.allclose(i3d(video[1:]), logits[1:], rtol=1e-3, atol=1e-3)
    assert logits.std() > 0.5 and (logits[0] - logits[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="at least 9 frames"):
        i3d(video[:, :, :8])


@pytest.mark.parametrize(("side", "kernel", "stride"), ((17, 7, 2), (224, 7, 2), (9, 3, 2), (5, 2, 2), (6, 3, 1)))
def test_padding_is_tensorflows(side, kernel, stride):
    x = torch.ones(1, 1, side, 4, 4)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1))
    out = -(-side // stride)
    total = padded.shape[2] - side
    assert (padded.shape[2] - kernel) // stride + 1 == out
    assert total == max((out - 1) * stride + kernel - side, 0)
    assert int((padded[0, 0, : total // 2, 0, 0] == 0).sum()) == total // 2  # the odd one is at the end
    assert max_pool_same(x, (kernel, 1, 1), (stride, 1, 1)).shape[2] == out


def test_frames_are_resized_one_by_one():
    video = torch.rand(2, 3, 4, 20, 30)
    expected = F.interpolate(video[1, :, 2][None], size=(224, 224), mode="bilinear", align_corners=False)
    assert torch.allclose(resize_frames(video)[1, :, 2], expected[0])


def test_i3d_loads_tensors_only(i3d, tmp_path):
    weights = {k: v for k, v in i3d.state_dict().items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(weights, tmp_path / "i3d.safetensors")
    torch.save(weights, tmp_path / "rgb_imagenet.pt")
    for name in ("i3d.safetensors", "rgb_imagenet.pt"):
        loaded = load_i3d(str(tmp_path / name)).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())

    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "i3d_torchscript.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole_model.pt")
    for name in ("i3d_torchscript.pt", "whole_model.pt"):
        with pytest.raises(ValueError, match="holds more than tensors"):
            load_i3d(str(tmp_path / name))
    with pytest.raises(ValueError, match="does not exist"):
        load_i3d(str(tmp_path / "none.pt"))
    wrong = {**weights, "logits.conv3d.weight": torch.zeros(600, 1024, 1, 1, 1)}
    safetensors.torch.save_file(wrong, tmp_path / "kinetics600.safetensors")
    with pytest.raises(ValueError, match=r"1 weights differ: logits.conv3d.weight: file \[600, 1024, 1, 1, 1\]"):
        load_i3d(str(tmp_path / "kinetics600.safetensors"))
