"""A micro-batch reaches every tensor-parallel rank unchanged, though only rank 0 read it."""

import pytest
import torch

from megatron_fsvideo.config import DiTParallelConfig
from megatron_fsvideo.data.batch import Batch, broadcast_batch
from megatron_fsvideo.parallel.groups import initialize
from tests.parallel.harness import run_workers


def make_batch(seed: int, with_image: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        sample_ids=torch.tensor([2**60 - seed, 3]),
        epochs=torch.tensor([0, 7]),
        latents=torch.randn(2, 4, 3, 4 + seed, 5, generator=generator),
        text=torch.randn(2, 6, 5, generator=generator),
        text_lengths=torch.tensor([6, 2]),
        image=torch.randn(2, 3, 4, generator=generator) if with_image else None,
        captions=["ein Häschen", f"rank {seed}"],
    )


def receive(with_image: bool) -> dict:
    pgs = initialize(DiTParallelConfig(tensor_model_parallel_size=2))
    # Ranks 0 and 1, 2 and 3 are the tensor-parallel groups: shapes differ between them.
    batch = make_batch(pgs.dp_rank, with_image) if pgs.tp_rank == 0 else None
    received = broadcast_batch(batch, pgs)
    return received.tensors() | {"dp_rank": pgs.dp_rank, "captions": received.captions}


@pytest.mark.parametrize("with_image", [True, False])
def test_every_rank_of_a_group_has_what_its_first_read(with_image):
    for received in run_workers(receive, 4, with_image):
        expected = make_batch(received.pop("dp_rank"), with_image)
        assert received.pop("captions") == expected.captions
        assert set(received) == set(expected.tensors())
        for name, tensor in expected.tensors().items():
            assert torch.equal(torch.as_tensor(received[name]), tensor), name
