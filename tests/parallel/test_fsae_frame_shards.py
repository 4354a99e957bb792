"""A video's frames on several gloo processes: results, loss and gradients of one process."""

import pytest
import torch
from torch import Tensor

from megatron_fsvideo.config import ParallelConfig
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.context import DecodeContext
from megatron_fsvideo.models.fsae.frame_shards import FrameShards, latents_of_rank
from megatron_fsvideo.parallel import groups
from tests.parallel.harness import run_workers
from tests.unit.fsae_fixtures import build, config, difference, random_video

NUM_LATENTS = 7


def flat_gradients(fsae: FSAE) -> Tensor:
    return torch.cat([p.grad.flatten() for p in fsae.parameters()])


def model(kind: str) -> tuple[FSAE, Tensor, list[Tensor]]:
    fsae, video = build(config(kind)), random_video(4 * NUM_LATENTS - 3)
    features = fsae.first_frame_features(video)
    return fsae.requires_grad_(True), video, features


def sharded(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and frames of this rank, loss and gradients summed over ranks."""
    pgs = groups.initialize(ParallelConfig())
    fsae, video, features = model(kind)
    shards = FrameShards.of_clip(pgs.dp, video.shape[2])
    mine = shards.of(video)
    latents = fsae.encoder(mine, shards)
    decoded = fsae.decoder(latents, DecodeContext(shards, features))
    loss = (decoded - mine).abs().sum() / video.numel()
    loss.backward()
    summed = [groups.all_reduce_sum(x, pgs.dp) for x in (loss.detach(), flat_gradients(fsae))]
    groups.shutdown()
    return latents.detach(), decoded.detach(), *summed


@pytest.mark.parametrize(
    "kind, world_size", [("causal", 2), ("causal", 3), ("standard", 2), ("standard", 3), ("lite", 2), ("lite", 3)]
)
def test_ranks_together_are_one_process(kind: str, world_size: int) -> None:
    fsae, video, features = model(kind)
    latents = fsae.encode(video)
    decoded = fsae.decode(latents, features)
    loss = (decoded - video).abs().sum() / video.numel()
    loss.backward()
    gradients = flat_gradients(fsae)
    assert gradients.ne(0).float().mean() > 0.9, "vacuous otherwise"

    results = run_workers(sharded, world_size, kind)
    assert difference(torch.cat([result[0] for result in results], dim=2), latents.detach()) < 1e-12
    assert difference(torch.cat([result[1] for result in results], dim=2), decoded.detach()) < 1e-12
    for _, _, sum_loss, sum_gradients in results:
        assert difference(torch.as_tensor(sum_loss), loss.detach()) < 1e-12
        assert difference(sum_gradients, gradients) < 1e-9


def too_short() -> None:
    pgs = groups.initialize(ParallelConfig())
    latents_of_rank(3, pgs.dp)


def test_too_short_a_video_is_refused() -> None:
    with pytest.raises(AssertionError, match="3 latent frames cannot be shared by 2 processes.*at least 2"):
        run_workers(too_short, 2)
