"""A micro-batch as the shards hold it, before normalisation: what waits in host memory and what travels between ranks.

Latents and embeddings are bf16 in the shards, and a caption has its own number of rows: as fp32, padded to the model's
length, a micro-batch would be several times as large. `StoredBatch.to` makes the training step's tensors of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_fsvideo.data.batch import Batch
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import LatentSample, sample_id
from megatron_fsvideo.data.sampler import SampleRef
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.parallel.groups import ProcessGroups, broadcast_tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NUM_SIZES = 10


@dataclass(frozen=True)
class StoredBatch:
    """b samples of one bucket.

    Attributes:
        sample_ids, epochs, text_lengths: int64 [b].
        latents: [b, c, t, h, w].
        text: [sum of text_lengths, e]: the rows of all captions, one after another.
        image: [b, n, e].
        scale: of the latents in training.
        text_length: rows to which each caption is padded there.
    """

    sample_ids: torch.Tensor
    epochs: torch.Tensor
    text_lengths: torch.Tensor
    latents: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor
    scale: LatentScale
    text_length: int

    def to(self, device: torch.device | str) -> Batch:
        """Make the batch that the training step takes, on a device: fp32, normalised, padded."""
        lengths = self.text_lengths.tolist()
        rows = self.text.to(device, non_blocking=True).float()
        text = rows.new_zeros(len(lengths), self.text_length, rows.shape[1])  # [b, l, e]
        for padded, own in zip(text, rows.split(lengths), strict=True):
            padded[: len(own)] = own
        image = self.image.to(device, non_blocking=True).float()
        return Batch(
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            epochs=self.epochs.to(device, non_blocking=True),
            latents=self.scale.normalize(self.latents.to(device, non_blocking=True).float()),
            text=text,
            image=image if image.shape[2] else None,
        )


def stack(samples: Sequence[LatentSample], epochs: Sequence[int], scale: LatentScale, text_length: int) -> StoredBatch:
    """Make a micro-batch of samples of one bucket.

    Args:
        epochs: of each sample.
        scale: mean and std of the latents.
        text_length: rows to which each caption is padded in training.
    """
    return StoredBatch(
        sample_ids=torch.tensor([sample_id(sample.key) for sample in samples], dtype=torch.int64),
        epochs=torch.tensor(list(epochs), dtype=torch.int64),
        text_lengths=torch.tensor([len(sample.text) for sample in samples], dtype=torch.int64),
        latents=torch.stack([sample.latents for sample in samples]),
        text=torch.cat([sample.text for sample in samples]),
        image=torch.stack([sample.image for sample in samples]),
        scale=scale,
        text_length=text_length,
    )


def read_batch(dataset: LatentDataset, refs: Sequence[SampleRef]) -> StoredBatch:
    """Read the samples of one micro-batch."""
    samples = [dataset.read(ref.stream_index, ref.position) for ref in refs]
    return stack(samples, [ref.epoch for ref in refs], dataset.scale, dataset.text_length)


def broadcast_batch(
    batch: StoredBatch | None, num_samples: int, scale: LatentScale, text_length: int, pgs: ProcessGroups
) -> StoredBatch:
    """Give every rank of a tensor-parallel group the micro-batch that its rank 0 read (the others pass None).

    It goes from host memory to host memory, as it is stored. All ranks may call it in a thread of their own, beside a
    training step: it uses a group that nothing else uses.
    """
    if pgs.tp_size == 1:
        assert batch is not None, "a rank without others reads for itself"
        return batch
    header = torch.empty(3 * num_samples + _NUM_SIZES, dtype=torch.int64)
    if batch is not None:
        header = torch.cat([batch.sample_ids, batch.epochs, batch.text_lengths, torch.tensor(_sizes(batch))])
    broadcast_tensor(header, pgs.tp_host, 0)
    sample_ids, epochs, text_lengths = header[:-_NUM_SIZES].view(3, num_samples)
    *shape, text_width, image_rows, image_width, first, second, third = header[-_NUM_SIZES:].tolist()
    shapes = (num_samples, *shape), (int(text_lengths.sum()), text_width), (num_samples, image_rows, image_width)
    mine = (None, None, None) if batch is None else (batch.latents, batch.text, batch.image)
    latents, text, image = (
        _broadcast_bytes(torch.empty(size, dtype=_DTYPES[number]) if tensor is None else tensor, pgs)
        for tensor, size, number in zip(mine, shapes, (first, second, third), strict=True)
    )
    return StoredBatch(sample_ids, epochs, text_lengths, latents, text, image, scale, text_length)


def _sizes(batch: StoredBatch) -> list[int]:
    """Sizes that the receivers need: c, t, h, w, width of the text, rows and width of the image, three dtypes."""
    dtypes = [_DTYPES.index(tensor.dtype) for tensor in (batch.latents, batch.text, batch.image)]
    return [*batch.latents.shape[1:], batch.text.shape[1], *batch.image.shape[1:], *dtypes]


def _broadcast_bytes(tensor: torch.Tensor, pgs: ProcessGroups) -> torch.Tensor:
    if tensor.numel():
        broadcast_tensor(tensor.view(torch.uint8), pgs.tp_host, 0)
    return tensor
