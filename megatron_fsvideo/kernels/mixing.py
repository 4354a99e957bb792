"""Interface of layer memory's kernels: mix, norm and modulate; the backward of that; and the pulled gradient.

Letters: s tokens of this rank, b samples, h channels, l states that a layer reads.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class MixResult(NamedTuple):
    """Results of the forward pass. The backward pass needs all of them except `output`.

    Attributes:
        output: keys' and values' source [s, b, h], in the states' dtype.
        weights: softmax over the states [s, b, l], fp32.
        memory: the mix [s, b, h]: of raw states in their dtype, of normed ones in fp32.
        mean, rstd: the mix's statistics [s, b], fp32, where raw states are mixed.
    """

    output: Tensor
    weights: Tensor
    memory: Tensor
    mean: Tensor | None
    rstd: Tensor | None


@dataclass(frozen=True)
class MixSettings:
    """Settings of the mix.

    Attributes:
        norms_states: layer norm each state and mix those, or else mix the raw states and norm the mix.
        epsilon: of the norms.
    """

    norms_states: bool
    epsilon: float


class Mixer(Protocol):
    """One implementation of the kernels; `torch_mixing` is the reference."""

    def mix(
        self, logits: Tensor, states: list[Tensor], shift: Tensor, scale: Tensor, settings: MixSettings
    ) -> MixResult:
        """m = sum_i softmax(logits)_i X_i, normed, times 1 + scale, plus shift.

        With `norms_states` the sum runs over layer-normed states and is not normed again.

        Args:
            logits: [s, b, l], fp32. states: l x [s, b, h]. shift, scale: [b, h], fp32.
        """

    def mix_backward(
        self, gradient: Tensor, result: MixResult, states: list[Tensor], scale: Tensor, settings: MixSettings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The backward of `mix`, up to the mix itself.

        Args:
            gradient: of the output [s, b, h].

        Returns:
            the gradients of the mix g [s, b, h] in the states' dtype, of the logits [s, b, l], shift and scale [b, h],
            fp32. What the states get of g is left to `pull`.
        """

    def pull(
        self,
        gradients: list[Tensor],
        index: int,
        reads: list[tuple[Tensor, Tensor]],
        state: Tensor,
        settings: MixSettings,
    ) -> Tensor:
        """sum of gradients + sum over reads (weights, g) of weights[..., index] * g, in fp32 and rounded once.

        With `norms_states` the second sum goes back through the norm of `state`, X_index [s, b, h].

        Args:
            gradients: what X_index receives besides, at most two of [s, b, h].
            reads: weights [s, b, l > index], fp32, and g [s, b, h] of each layer that read X_index.
        """
