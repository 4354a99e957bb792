"""Mean routing weights against a loop over tokens, and the figure of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.evaluation.router_figure import router_pixels
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.models.dit.router_weights import RouterWeights

MODEL = build_job(DiTJob, DIT_PRESETS["dit_debug"] | {"num_layers": 3}).model
ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
ALONE = SimpleNamespace(cp=ONE, tp=ONE, device=torch.device("cpu"))


class Layers(nn.Module):
    """Two routers that see the same tokens and mix nothing."""

    def __init__(self):
        super().__init__()
        self.memories = nn.ModuleList(LayerMemory(number, 8) for number in (2, 3))
        for memory in self.memories:
            memory.forward = lambda source: source

    def forward(self, source):
        for memory in self.memories:
            memory(source)


def test_means_and_maxima_of_first_and_other_frames(monkeypatch):
    for name in ("all_reduce_sum", "all_reduce_max"):
        monkeypatch.setattr(f"megatron_fsvideo.models.dit.router_weights.{name}", lambda tensor: tensor)
    torch.manual_seed(0)
    layers, router = Layers(), RouterWeights(MODEL, DiTParallelConfig(), ALONE)
    batches = [torch.randn(12, 2, 8), torch.randn(12, 1, 8)]  # 3 frames of 2 x 2 tokens
    for batch in batches:
        with router.recording(layers, (3, 2, 2)):
            layers(batch)
    layers(batches[0])  # not recorded
    means, maxima = router.mean(), router.maximum()
    assert torch.equal(means.isnan(), maxima.isnan())
    assert means.shape == (2, 2, 3) and means[:, 0, 2].isnan().all()
    for row, memory in enumerate(layers.memories):
        for kind, tokens in enumerate((slice(0, 4), slice(4, 12))):
            seen = torch.cat([memory.weights(batch[tokens]).flatten(0, 1) for batch in batches])
            torch.testing.assert_close(means[kind, row, : row + 2], seen.mean(0))
            torch.testing.assert_close(maxima[kind, row, : row + 2], seen.amax(0))
    pixels = router_pixels(means, "mean")
    assert pixels.dtype == torch.uint8 and pixels.shape[-1] == 3 and pixels.float().std() > 10


class Padded(SimpleNamespace):
    """A layout that pads a rank's tokens to a multiple of 4."""

    token_multiple = 4


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_padding_and_ranks_are_as_in_the_model(sequence_parallel):
    """3 frames of 2 x 3 tokens on 2 context-parallel ranks: 9 each, padded to 12, or to 16 with tensor-parallel."""
    expected = {
        (0, 0): [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
        (1, 0): [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    }
    if sequence_parallel:
        expected = {
            (0, 0): [0, 0, 0, 0, 0, 0, 1, 1],
            (0, 1): [1, 2, 2, 2, 2, 2, 2, 2],
            (1, 0): [1, 1, 1, 1, 1, 1, 1, 1],
            (1, 1): [1, 2, 2, 2, 2, 2, 2, 2],
        }
    for (cp, tp), kinds in expected.items():
        groups = [SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank) for rank in (cp, tp)]
        pgs = SimpleNamespace(cp=groups[0], tp=groups[1], device=torch.device("cpu"))
        router = RouterWeights(MODEL, Padded(sequence_parallel=sequence_parallel), pgs)
        assert router._kinds_of_tokens((3, 2, 3)).tolist() == kinds
