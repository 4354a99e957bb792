"""Exponential moving average of the weights, in fp32, of this rank's part of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    The average starts as the initial weights. Early on the decay is smaller, (1 + n) / (10 + n) after n steps, so that
    a short run's average does not remember where it started. It depends on n alone: a resumed run does the same.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after optimizer step `iteration` (from 1)."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(parameter.float(), 1 - decay)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the average with saved tensors."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the model's present weights."""
        self.load({name: parameter.detach() for name, parameter in self._parameters.items()})

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
