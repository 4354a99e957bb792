"""Batch sizes: an optimizer step's samples of each bucket, and how a layout cuts them.

How many samples a step has follows from the data and the flags alone, so that every layout trains on the same batches.
How many of them are one micro-batch follows from the layout. A layout that cannot share the batches is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm

from megatron_fsvideo.data.buckets import Bucket


def global_batch_sizes(
    tokens: Mapping[Bucket, int], global_batch_size: int, multiple: int = 0, tokens_per_batch: int = 0
) -> dict[Bucket, int]:
    """Samples of an optimizer step of each bucket, for about a constant number of tokens.

    Args:
        tokens: tokens (or other units of work) of one sample of each bucket.
        global_batch_size: of the bucket with most tokens, unless there is a budget.
        multiple: batches are the nearest multiple of it, at least one; 0 takes `global_batch_size`.
        tokens_per_batch: budget; 0 is none.

    Raises:
        ValueError: `global_batch_size` is not a multiple of `multiple`, and there is no budget.
    """
    if multiple and global_batch_size % multiple and not tokens_per_batch:
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of batch_size_multiple {multiple}")
    multiple = multiple or global_batch_size
    budget = tokens_per_batch or global_batch_size * max(tokens.values())
    return {
        bucket: max(1, (2 * budget + count * multiple) // (2 * count * multiple)) * multiple
        for bucket, count in tokens.items()
    }


@dataclass(frozen=True)
class Sharing:
    """How a layout cuts the batches of one bucket.

    Attributes:
        dp_size: data-parallel ranks, each of which gets the same number of samples.
        micro_batch: samples of a micro-batch.
        may_shrink: whether a micro-batch may also have fewer samples: the largest number that divides a part.
        num_parts: into so many equal parts a data-parallel rank's samples are cut before they are cut into
            micro-batches.
        parts_name: why, for messages.
    """

    dp_size: int
    micro_batch: int
    may_shrink: bool = False
    num_parts: int = 1
    parts_name: str = "parts"

    @property
    def unit(self) -> int:
        """A batch must be a multiple of it."""
        return self.dp_size * self.num_parts * (1 if self.may_shrink else self.micro_batch)

    def micro_batch_of(self, batch: int) -> int:
        """Samples of a micro-batch of a batch that is a multiple of `unit`."""
        part = batch // (self.dp_size * self.num_parts)
        return next(size for size in range(min(self.micro_batch, part), 0, -1) if part % size == 0)


def micro_batch_sizes(batches: Mapping[Bucket, int], sharing: Mapping[Bucket, Sharing]) -> dict[Bucket, int]:
    """Samples of a micro-batch of each bucket.

    Raises:
        ValueError: the layout cannot share the batches of a bucket: with all the numbers, and the nearest that work.
    """
    uneven = [bucket for bucket, batch in batches.items() if batch % sharing[bucket].unit]
    if uneven:
        raise ValueError(f"{_describe(batches, sharing, uneven)}; {_advise(batches, sharing)}")
    return {bucket: sharing[bucket].micro_batch_of(batch) for bucket, batch in batches.items()}


def _describe(batches: Mapping[Bucket, int], sharing: Mapping[Bucket, Sharing], uneven: list[Bucket]) -> str:
    parts = []
    for bucket in uneven:
        share = sharing[bucket]
        factors = [f"data-parallel size {share.dp_size}"]
        factors += [f"{share.parts_name} {share.num_parts}"] if share.num_parts > 1 else []
        factors += [] if share.may_shrink else [f"micro_batch_size {share.micro_batch}"]
        below = batches[bucket] // share.unit * share.unit
        nearest = f"{below} or {below + share.unit}" if below else f"{share.unit}"
        parts.append(
            f"a batch of {bucket} has {batches[bucket]} samples, which is not a multiple of {' x '.join(factors)} = "
            f"{share.unit} (nearest: {nearest})"
        )
    return "; ".join(parts)


def _advise(batches: Mapping[Bucket, int], sharing: Mapping[Bucket, Sharing]) -> str:
    multiple = lcm(*(sharing[bucket].unit for bucket in batches))
    advice = f"batch_size_multiple and global_batch_size that are multiples of {multiple} suit this layout"
    per_rank = {bucket: sharing[bucket].unit // sharing[bucket].dp_size for bucket in batches}
    if any(batch % per_rank[bucket] for bucket, batch in batches.items()):
        return advice
    common = gcd(*(batch // per_rank[bucket] for bucket, batch in batches.items()))
    dp_size = max(share.dp_size for share in sharing.values())
    fitting = [size for size in range(1, common + 1) if common % size == 0]
    below = [size for size in fitting if size < dp_size][-1:]
    above = [size for size in fitting if size > dp_size][:1]
    return f"{advice}; these batches suit data-parallel size {' or '.join(map(str, below + above))}"
