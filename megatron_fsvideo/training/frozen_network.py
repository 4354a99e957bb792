"""One network that a job uses and never changes: sharded weights, without DDP, optimizer or section of a checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.schedule import run_schedule, share_from_last_stage


class FrozenNetwork:
    """Gradients pass through the network to its inputs; its weights get none.

    Args:
        chunks: the network on this rank: one module, or with virtual pipeline stages several.
        path: folder from which the weights were loaded.
        fingerprint: fingerprint of the weights, equal for all layouts.
    """

    def __init__(self, chunks: Sequence[nn.Module], path: str, fingerprint: str, pgs: ProcessGroups) -> None:
        self.pgs = pgs
        self.chunks = nn.ModuleList(chunks).eval().requires_grad_(False)
        self.path = path
        self.fingerprint = fingerprint

    @property
    def model(self) -> nn.Module:
        """The network's only module; an error with virtual stages."""
        (chunk,) = self.chunks
        return chunk

    @torch.no_grad()
    def prepare(self, batches: list[Any], forward_step: Callable[..., Any]) -> list[Tensor]:
        """Compute the output for every micro-batch, on every pipeline stage, before Megatron's schedule trains.

        Args:
            forward_step: (iterator over batches, chunk) -> the chunk's output.
        """

        def megatron_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            # Megatron multiplies the first value that the function returns in place.
            return forward_step(iterator, chunk), lambda output: (output.new_zeros(()), {"output": output})

        collected = run_schedule(megatron_step, list(self.chunks), batches, self.pgs, forward_only=True)
        return share_from_last_stage([entry["output"] for entry in collected], self.pgs)

    def record(self) -> dict[str, str]:
        """Entry of the network in a checkpoint's job.json, under `RunDescription.frozen`; compared at resume."""
        return {"path": self.path, "fingerprint": self.fingerprint}
