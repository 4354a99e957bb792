"""What the modules share."""

import pickle

import torch
from torch import Tensor, nn


class Untouchable:
    """Code that an unpickled file would run."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise AssertionError('somebody unpickled _extra_state')",))


class Module(nn.Module):
    """A module whose FP8 state is a pickle under `_extra_state`, as Transformer Engine's is."""

    def get_extra_state(self) -> Tensor:
        """A pickle that bites."""
        return torch.frombuffer(bytearray(pickle.dumps(Untouchable())), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Unpickle, as the real one does."""
        if state is not None:
            pickle.loads(state.numpy().tobytes())


def mark(parameter: nn.Parameter, dim: int) -> None:
    """This rank's slice of a parameter."""
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        assert not hasattr(parameter, name)
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1
