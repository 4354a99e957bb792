"""The bank of states that layer memory reads, and the backward pass through them.

A bank belongs to one micro-batch on one model chunk: `DiTBlock.forward` makes it, the autograd graph keeps it, and it
goes with the graph. It holds X_0, X_1, ... as detached aliases: full recomputation keeps the same tensors as layer
inputs, so the bank costs no memory of its own then, and holding no graph it closes no reference cycle.

**Pull form.** Layer l reads m_l = sum_i w_li X_i. Plain autograd would push w_li g_l (g_l: the gradient of m_l) into
the gradients of all l states, reading and writing each l times, and round each time. Here nothing flows to the states
through autograd:

    Read(l)     backward: leaves w_l and g_l in the bank
    Remember(i) on the main path X_i; backward: adds sum_{l > i} w_li g_l to the gradient of X_i, in one pass

**Order.** All reads of X_i must have run backward before Remember(i) does. X_{l-1} is therefore an input of Read(l),
although no gradient returns that way: autograd runs a node after everything downstream of its output, and for l > i
X_{l-1} is downstream of (or is) X_i.

**Pipeline stages.** A later stage receives X_0 .. X_k as one tensor, of which only X_k goes on through autograd:

    Send     backward: the gradients that the next stage returns for X_0 .. X_{k-1} join the bank, that of X_k goes on
    Receive  backward: pulls the gradients of all received states and returns them in one tensor

**Lifetime.** X_i leaves the bank in the backward of Remember(i), where the last of its reads has run. Each g_l takes
the place of one such state and is needed until X_0: the sum of both stays what the states alone were.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fsvideo.kernels import Mixer, MixResult, MixSettings


class MemoryBank:
    """States of one micro-batch, and what their gradients are made of. States are [s, b, h]."""

    def __init__(self, mixer: Mixer, settings: MixSettings) -> None:
        self.mixer = mixer
        self.settings = settings
        self._states: dict[int, Tensor] = {}
        self._num_states = 0
        self._reads: list[tuple[Tensor, Tensor]] = []
        self._gradients_of_sent: dict[int, Tensor] = {}

    def remember(self, state: Tensor) -> Tensor:
        """Take in the next X_i; the layers go on with what this returns."""
        return _Remember.apply(state, self)

    def read(self, logits: Tensor, latest: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Mix all states so far by the softmax of a router's logits, normed and modulated like the queries' source.

        Args:
            logits: [s, b, l], fp32.
            latest: the last remembered state, as `remember` returned it.
            shift, scale: [b, h], fp32.

        Returns:
            the keys' and values' source [s, b, h].
        """
        return _Read.apply(logits, latest, shift, scale, self)

    def send(self, latest: Tensor) -> Tensor:
        """All states and `latest`, the output of the last layer here, for the next stage: [(k + 1) * s, b, h]."""
        return _Send.apply(latest, self)

    def receive(self, packed: Tensor, num_states: int) -> Tensor:
        """Take in what the previous stage sent; the layers go on with X_k, which this returns."""
        return _Receive.apply(packed, num_states, self)

    def states(self, number: int) -> list[Tensor]:
        """The first states, X_0 to X_{number - 1}.

        Raises:
            RuntimeError: a backward pass has freed them.
        """
        return [self._state(index) for index in range(number)]

    def _state(self, index: int) -> Tensor:
        if index not in self._states:
            raise RuntimeError("this layer memory was freed by a backward pass: run the forward pass again")
        return self._states[index]

    def _add(self, state: Tensor) -> int:
        index = self._num_states
        self._states[index] = state.detach()
        self._num_states += 1
        return index

    def _pull(self, index: int, gradients: list[Tensor]) -> Tensor:
        """The whole gradient of X_index, which leaves the bank; `gradients` is what autograd brings."""
        state = self._state(index)
        if index in self._gradients_of_sent:
            gradients = [*gradients, self._gradients_of_sent.pop(index)]
        total = self.mixer.pull(gradients, index, self._reads, state, self.settings)
        del self._states[index]
        return total

    def _clear(self) -> None:
        """After the pull of X_0 nobody needs the reads' gradients."""
        self._reads.clear()


class _Remember(torch.autograd.Function):
    """The identity, whose backward adds the gradient from all later reads."""

    @staticmethod
    def forward(ctx, state: Tensor, bank: MemoryBank) -> Tensor:
        ctx.bank, ctx.index = bank, bank._add(state)
        return state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = ctx.bank._pull(ctx.index, [gradient])
        if ctx.index == 0:
            ctx.bank._clear()
        return total, None


class _Read(torch.autograd.Function):
    """Softmax, mix, norm, modulation. Its backward leaves the states' share in the bank."""

    @staticmethod
    def forward(ctx, logits: Tensor, latest: Tensor, shift: Tensor, scale: Tensor, bank: MemoryBank) -> Tensor:
        result = bank.mixer.mix(logits, bank.states(logits.shape[-1]), shift, scale, bank.settings)
        ctx.bank = bank
        ctx.save_for_backward(scale, *result[1:])
        return result.output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        bank, result = ctx.bank, MixResult(gradient, *saved)
        states = bank.states(result.weights.shape[-1])
        mix_gradient, logits_gradient, shift_gradient, scale_gradient = bank.mixer.mix_backward(
            gradient, result, states, scale, bank.settings
        )
        bank._reads.append((result.weights, mix_gradient))
        return logits_gradient, None, shift_gradient, scale_gradient, None


class _Send(torch.autograd.Function):
    """The pack that a stage sends: always a copy, for Megatron's schedule frees the data of what it has sent."""

    @staticmethod
    def forward(ctx, latest: Tensor, bank: MemoryBank) -> Tensor:
        ctx.bank = bank
        return torch.cat([*bank.states(bank._num_states), latest], dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        *earlier, latest = gradient.chunk(ctx.bank._num_states + 1, dim=0)
        ctx.bank._gradients_of_sent = dict(enumerate(earlier))
        return latest, None


class _Receive(torch.autograd.Function):
    """X_k of a received pack; its backward returns the gradients of X_0 .. X_k."""

    @staticmethod
    def forward(ctx, packed: Tensor, num_states: int, bank: MemoryBank) -> Tensor:
        ctx.bank, ctx.num_states = bank, num_states
        states = packed.chunk(num_states, dim=0)
        for state in states:
            bank._add(state)
        return states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        bank, last = ctx.bank, ctx.num_states - 1
        packed = gradient.new_empty(ctx.num_states * len(gradient), *gradient.shape[1:])
        for index, part in enumerate(packed.chunk(ctx.num_states, dim=0)):
            part.copy_(bank._pull(index, [gradient] if index == last else []))
        bank._clear()
        return packed, None, None
