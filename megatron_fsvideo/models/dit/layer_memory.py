"""Layer memory: keys and values read a mix of all earlier layers' inputs (paper section 2.3, eq. 6-8).

X_0 is the patch embedding, X_l the output of layer l. Layer l >= 2 has a router that weighs X_0 .. X_{l-1} for each
token, for all heads alike:

    logits = W_l a + c_l          a is layer l's modulated input: the router sees the time, and so do queries
    memory = sum_i softmax(logits)_i X_i

Queries and the residual still come from X_{l-1}. Decisions that the paper leaves open: logits, softmax and sum are in
fp32; the bias makes X_{l-1} weigh `layer_memory_init` at the start, and W starts at zero.

Between pipeline stages the states travel as one tensor: see `pack`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# exp(-60) of the other states vanishes beside 1 in fp32: the mix is X_{l-1} to the last bit.
IDENTITY_BIAS = 60.0


class LayerMemory(nn.Module):
    """The router of one layer. `layer_number` counts from 1; layer 1 has nothing to remember and no router."""

    def __init__(self, layer_number: int, hidden_size: int, initial_weight: float) -> None:
        super().__init__()
        assert layer_number >= 2
        self.num_states = layer_number
        self.initial_weight = initial_weight
        self.router = nn.Linear(hidden_size, layer_number)  # fp32: its logits are

    def reset_parameters(self) -> None:
        """Start near the identity."""
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.router.bias.data[-1] = identity_leaning_bias(self.num_states, self.initial_weight)

    def weights(self, router_input: Tensor) -> Tensor:
        """Mixing weights [s, b, l], fp32, from the layer's modulated input [s, b, h]."""
        return torch.softmax(self.router(router_input.float()), dim=-1)

    def forward(self, router_input: Tensor, states: list[Tensor]) -> Tensor:
        """Mix the states X_0 .. X_{l-1}, each [s, b, h], to [s, b, h] in fp32."""
        assert len(states) == self.num_states, f"{len(states)} states for a router over {self.num_states}"
        return mix(self.weights(router_input), states)


def mix(weights: Tensor, states: list[Tensor]) -> Tensor:
    """sum_i weights[..., i] * states[i], accumulated in fp32. [s, b, l], l x [s, b, h] -> [s, b, h]"""
    total = weights[..., 0:1] * states[0]
    for index, state in enumerate(states[1:], start=1):
        total = torch.addcmul(total, weights[..., index : index + 1], state.float())
    return total


def identity_leaning_bias(num_states: int, initial_weight: float) -> float:
    """The last logit that gives the last of `num_states` states this softmax weight when all other logits are 0."""
    if initial_weight == 1.0:
        return IDENTITY_BIAS
    return math.log((num_states - 1) * initial_weight / (1 - initial_weight))


def pack(states: list[Tensor]) -> Tensor:
    """What a pipeline stage sends: X_0 .. X_k, k + 1 times [s, b, h] -> one new tensor [(k + 1) * s, b, h].

    One tensor of varying length serves every schedule of Megatron's. It is always a copy: the schedule frees the data
    of what it has sent, which must not be a view of states that this stage still needs.
    """
    return torch.cat(states, dim=0)


def unpack(packed: Tensor, num_states: int) -> list[Tensor]:
    """The inverse of `pack`. The gradients of the states go back to the sender packed the same way."""
    return list(packed.chunk(num_states, dim=0))


def normalized(state: Tensor, epsilon: float) -> Tensor:
    """A state as the `normalized` variant mixes it: layer norm without weights, fp32."""
    return F.layer_norm(state.float(), state.shape[-1:], eps=epsilon)
