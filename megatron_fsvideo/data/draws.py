"""Random choices that are a function of a generator's state, in the time of a look-up."""

import numpy as np
import torch

MULTINOMIAL_UP_TO = 1 << 16
"""So many weights are drawn from by torch, so that runs of earlier versions go on with the clips that they had."""


class WeightedDraw:
    """Draws indices in proportion to whole weights, of which the sum is positive and below 2^53.

    torch.multinomial makes a random number for each weight, and refuses more than 2^24 of them.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = torch.from_numpy(weights.astype(np.float64)) if len(weights) <= MULTINOMIAL_UP_TO else None
        self._until = np.cumsum(weights, dtype=np.int64)

    def __call__(self, generator: torch.Generator) -> int:
        """Draw an index."""
        if self._weights is not None:
            return int(torch.multinomial(self._weights, 1, generator=generator))
        position = int(torch.randint(int(self._until[-1]), (1,), generator=generator))
        return int(np.searchsorted(self._until, position, side="right"))


def draw(largest: int, generator: torch.Generator) -> int:
    """Draw a whole number in 0..largest."""
    return int(torch.randint(largest + 1, (1,), generator=generator))
