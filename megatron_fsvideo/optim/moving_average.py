"""Exponential moving average, in fp32, of the weights or ranges of weights that this rank's optimizer holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_fsvideo.optim.held import fill, held_by_this_rank, spread_weights
from megatron_fsvideo.optim.state import weight_names


class MovingAverage:
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    The average starts as the initial weights. Early on the decay is smaller (`warm_decay`), so that a short run's
    average is not dominated by the initial weights. The decay depends on the iteration alone, also in a resumed run.

    Each rank averages what its optimizer holds: whole parameters, or with the distributed optimizer a share of them. In
    a checkpoint both lie under the same keys, and any layout reads either.

    Args:
        weights: of `optim.state.sharded_weights`.

    Attributes:
        weights: name -> average of the part that this rank holds, fp32.
    """

    def __init__(self, optimizer: ChainedOptimizer, weights: dict[str, ShardedTensor], decay: float) -> None:
        names = weight_names(weights)
        self.decay = decay
        self._optimizer = optimizer
        self._held = {names[held.parameter]: held for held in held_by_this_rank(optimizer)}
        self._untrained = {name for parameter, name in names.items() if not parameter.requires_grad}
        self.weights = {name: held.master.detach().float().clone() for name, held in self._held.items()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Update the average with the weights after optimizer step `iteration` (from 1)."""
        decay = warm_decay(self.decay, iteration)
        for name, held in self._held.items():
            self.weights[name].lerp_(held.master.float(), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the present weights."""
        for name, held in self._held.items():
            self.weights[name].copy_(held.master)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights, gathered from all data-parallel ranks."""
        trained = {name: held.target.clone() for name, held in self._held.items()}
        self._write(self.weights)
        try:
            yield
        finally:
            self._write(trained)

    def sharded_state(self, weights: dict[str, ShardedTensor]) -> dict[str, dict[str, ShardedTensor]]:
        """Sharded tensors of the average for a checkpoint, under the keys `ema.<weight>`.

        Args:
            weights: of `optim.state.sharded_weights`. Those that are not trained are their own average.
        """
        state = {}
        for name, weight in weights.items():
            key = f"ema.{weight.key}"
            if name in self._untrained:
                frozen = weight.data.detach().float()
                state[name] = {"0": replace(weight, key=key, data=frozen, dtype=torch.float32)}
            elif name in self._held:
                state[name] = self._held[name].sharded(weight, self.weights[name], key)
        return state

    @torch.no_grad()
    def load_state(self, content: dict[str, Any]) -> None:
        """Load the tensors that a checkpoint has for `sharded_state`."""
        for name, average in self.weights.items():
            fill(average, content[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        # In place: the parameters may be views of Megatron's communication buffers.
        for name, held in self._held.items():
            held.target.copy_(values[name])
        spread_weights(self._optimizer)


def warm_decay(decay: float, iteration: int) -> float:
    """The decay of update `iteration` (from 1): at most (1 + n) / (10 + n)."""
    return min(decay, (1 + iteration) / (10 + iteration))
