"""A micro-batch that rank 0 read reaches every tensor-parallel rank as it is stored, ahead of its step."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import LatentSample, sample_id
from megatron_fsvideo.data.stored_batch import broadcast_batch, stack
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.parallel.groups import all_reduce_sum, initialize
from megatron_fsvideo.tasks.dit.batches import BatchSource
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers

SCALE, TEXT_LENGTH = LatentScale([0.1, -0.2, 0.3, 7.0], [1.1, 0.3, 2.0, 3.0]), 6
LENGTHS = (5, 0)


def samples(seed: int, dtype: torch.dtype = torch.bfloat16, image_rows: int = 3) -> list[LatentSample]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        LatentSample(
            draw(4, 3, 4 + seed, 5), draw(length, 7), draw(image_rows, image_rows), {"key": f"{seed}{k}abcdef"}
        )
        for k, length in enumerate(LENGTHS)
    ]


def expected_batch(found: list[LatentSample]) -> dict[str, torch.Tensor | None]:
    """The training step's tensors, sample by sample in fp32: written anew here."""
    text = torch.zeros(len(found), TEXT_LENGTH, 7)
    for row, sample in zip(text, found, strict=True):
        row[: len(sample.text)] = sample.text.float()
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (SCALE.mean, SCALE.std))
    image = torch.stack([sample.image.float() for sample in found])
    return {
        "sample_ids": torch.tensor([sample_id(sample.key) for sample in found]),
        "epochs": torch.tensor([0, 7]),
        "latents": torch.stack([(sample.latents.float() - mean) / std for sample in found]),
        "text": text,
        "image": image if image.shape[2] else None,
    }


def tensors(batch: Batch) -> dict[str, torch.Tensor | None]:
    return vars(batch)


class ByteCounter:
    """Counts what `dist.broadcast` sends."""

    def __init__(self) -> None:
        self.count = 0
        self.broadcast, dist.broadcast = dist.broadcast, self

    def __call__(self, tensor: torch.Tensor, **settings) -> None:
        self.count += tensor.numel() * tensor.element_size()
        self.broadcast(tensor, **settings)


def receive(cases: list[tuple[torch.dtype, int]]) -> tuple[int, list]:
    pgs = initialize(DiTParallelConfig(tensor_model_parallel_size=2))
    counter, found = ByteCounter(), []
    for dtype, image_rows in cases:
        # Ranks 0 and 1, 2 and 3 are the tensor-parallel groups: shapes differ between them.
        batch = stack(samples(pgs.dp_rank, dtype, image_rows), [0, 7], SCALE, TEXT_LENGTH)
        before = counter.count
        received = broadcast_batch(batch if pgs.tp_rank == 0 else None, len(LENGTHS), SCALE, TEXT_LENGTH, pgs)
        found.append((counter.count - before, tensors(received.to("cpu"))))
    return pgs.dp_rank, found


def test_every_rank_has_bit_for_bit_what_the_first_read_and_no_more_bytes_were_sent():
    cases = [(torch.bfloat16, 3), (torch.bfloat16, 0), (torch.float32, 3), (torch.float16, 3)]
    for dp_rank, found in run_workers(receive, 4, cases):
        for (dtype, image_rows), (count, received) in zip(cases, found, strict=True):
            read = samples(dp_rank, dtype, image_rows)
            for name, tensor in expected_batch(read).items():
                same = tensor is None and received[name] is None or torch.equal(torch.as_tensor(received[name]), tensor)
                assert same, f"{name} of {dtype}"
            stored = sum(t.numel() * t.element_size() for s in read for t in (s.latents, s.text, s.image))
            assert count == stored + 8 * (3 * len(read) + 10), "own rows and lengths, in the dtype of the shards"


def job_of(folder: Path, num_workers: int, tp_size: int) -> DiTJob:
    values = {"data_path": (str(folder),), "tensor_model_parallel_size": tp_size, "num_workers": num_workers}
    values |= {"global_batch_size": 2, "latent_channels": 4, "text_embed_dim": 12, "image_embed_dim": 10}
    return build_job(DiTJob, DIT_PRESETS["dit_debug"] | values)


def take(folder: Path, num_workers: int, tp_size: int) -> list:
    """Steps of training: samples, tokens and all tensors; the model's collectives and validations run in between."""
    job = job_of(folder, num_workers, tp_size)
    pgs = initialize(job.parallel)
    dataset = LatentDataset(job.data.data_path)
    source = BatchSource(dataset, job, pgs, consumed_samples=4)
    steps = []
    for _ in range(7):
        steps.append(source.next())
        for _ in range(20):
            assert all_reduce_sum(torch.ones(3), pgs.tp).tolist() == [tp_size] * 3
        validation = BatchSource(dataset, job, pgs, shuffle=False)
        steps += [validation.next() for _ in range(2)]
        validation.close()
    source.close()
    return [(number, tokens, [tensors(batch.to("cpu")) for batch in batches]) for batches, number, tokens in steps]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_thread_fetches_the_same_batches_beside_the_step(tmp_path, num_workers):
    folder = write_latent_dataset(tmp_path, 24, buckets=("5x32x32", "1x32x32", "9x32x32"))
    (alone,) = run_workers(take, 1, folder, 0, 1)
    assert len({tokens for _, tokens, _ in alone}) == 3, "all buckets were met"
    for rank in run_workers(take, 2, folder, num_workers, 2):
        for (samples_here, tokens, batches), (samples_there, tokens_there, expected) in zip(rank, alone, strict=True):
            assert (samples_here, tokens, len(batches)) == (samples_there, tokens_there, len(expected))
            for ours, theirs in zip(batches, expected, strict=True):
                assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
