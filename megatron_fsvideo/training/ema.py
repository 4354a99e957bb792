"""Exponential moving average of the weights, in fp32, of this rank's part of the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    The average starts as the initial weights. Early on the decay is smaller (`warm_decay`), so that a short run's
    average does not remember where it started. It depends on the iteration alone: a resumed run does the same.

    Args:
        masters: parameter name -> the fp32 tensor that is stepped in its place; None averages the parameters.
    """

    def __init__(self, model: nn.Module, decay: float, masters: Mapping[str, Tensor] | None = None) -> None:
        self._parameters = dict(model.named_parameters())
        self._masters = self._parameters if masters is None else masters
        self.decay = decay
        self.weights = {name: self._masters[name].detach().float().clone() for name in self._parameters}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after optimizer step `iteration` (from 1)."""
        decay = warm_decay(self.decay, iteration)
        for name, average in self.weights.items():
            average.lerp_(self._masters[name].float(), 1 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the average with saved tensors."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the present weights."""
        self.load({name: self._masters[name].detach() for name in self._parameters})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights."""
        with torch.no_grad():
            # Copied in place: the parameters may be views of Megatron's communication buffers.
            trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self._write(self.weights)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])


def warm_decay(decay: float, iteration: int) -> float:
    """The decay of update `iteration` (from 1): at most (1 + n) / (10 + n)."""
    return min(decay, (1 + iteration) / (10 + iteration))
