"""Muon: momentum, orthogonalised matrix by matrix (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

The size of its step does not depend on the gradient's size. The autoencoder's convolutions have a fan-in in the
thousands: AdamW diverges there at a rate that learns in minutes, and Muon does not.
"""

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fsvideo.optim.matrix_exchange import MatrixExchange, in_batches
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.sequence import all_gather_each, local_slice, share_in_turn

MOMENTUM = 0.95
MOMENTUM_BUFFER = "momentum_buffer"
# Coefficients of the quintic iteration, from the reference above: singular values end in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Largest number of elements gathered over the tensor-parallel ranks at once: 1 GiB in fp32.
GATHERED_AT_ONCE = 2**28


def orthogonalize(matrix: Tensor, dtype: torch.dtype, num_steps: int = 5) -> Tensor:
    """Approximate U V^T of a matrix's singular value decomposition: [rows, columns] -> [rows, columns], fp32.

    The iteration tolerates bf16, which is several times faster. fp32 serves to compare layouts to many digits.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def scaled_orthogonal(update: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of an update, scaled so that a step moves outputs of tall and wide matrices alike.

    Args:
        update: [out, ...]; the axes after the first count as one, so that a convolution's kernel is [out, in * taps].
    """
    matrix = update.flatten(1)
    rows, columns = matrix.shape
    return (orthogonalize(matrix, dtype) * max(1.0, rows / columns) ** 0.5).view_as(update)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay on weights of two or more axes.

    The momentum of a weight that tensor parallelism slices is gathered first, so that the update is the one that a
    single process makes. Rows may be gathered in another order, which orthogonalisation commutes with.

    Args:
        param_groups: with `lr` and `weight_decay`.
        tp: the tensor-parallel group.
        dtype: number format in which the orthogonalisation computes.
    """

    def __init__(self, param_groups: list[dict], tp: ProcessGroup, dtype: torch.dtype) -> None:
        super().__init__(param_groups, {"momentum": MOMENTUM})
        self.tp = tp
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient. The size of an update depends on `lr` alone."""
        for group in self.param_groups:
            for weights in in_batches([w for w in group["params"] if w.grad is not None], GATHERED_AT_ONCE):
                updates = [self._nesterov(weight, group["momentum"]) for weight in weights]
                for weight, direction in zip(weights, self._directions(weights, updates), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction.to(weight.dtype), alpha=-group["lr"])

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state[MOMENTUM_BUFFER] = torch.zeros_like(weight)
        state[MOMENTUM_BUFFER].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state[MOMENTUM_BUFFER], momentum)

    def _directions(self, weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """The scaled orthogonal factor of each update, or this rank's slice of it if the update is sliced.

        The tensor-parallel ranks share the work: each computes every tp_size-th factor. There are two collectives.
        """
        if self.tp.size() == 1:
            return [scaled_orthogonal(update, self.dtype) for update in updates]
        dims = [_sliced_dim(weight) for weight in weights]
        sliced = [k for k, dim in enumerate(dims) if dim is not None]
        wholes = list(updates)
        if sliced:
            gathered = all_gather_each([updates[k] for k in sliced], [dims[k] for k in sliced], self.tp)
            for k, whole in zip(sliced, gathered, strict=True):
                wholes[k] = whole
        made = [scaled_orthogonal(whole, self.dtype) for whole in wholes[self.tp.rank() :: self.tp.size()]]
        directions = share_in_turn(made, wholes, self.tp)
        for k in sliced:
            directions[k] = local_slice(directions[k], dims[k], self.tp)
        return directions


def build_muon(
    config: MegatronOptimizerConfig,
    groups: list[dict],
    pgs: ProcessGroups,
    dtype: torch.dtype,
    exchange: MatrixExchange | None,
) -> MegatronOptimizer:
    """Build Muon as one link of Megatron's optimizer chain.

    Args:
        groups: parameter groups of the matrices of all data-parallel ranks.
        exchange: moves matrices between the data-parallel ranks that own them; None if every rank keeps the
            momentum of all matrices.
    """
    if exchange is not None:
        groups = [group | {"params": [p for p in group["params"] if exchange.owns(p)]} for group in groups]
    muon = Muon(groups, pgs.tp, dtype)
    link: MegatronOptimizer
    if config.bf16:
        kind = Float16OptimizerWithFloat16Params if exchange is None else _OwnedMuonBF16
        link = kind(muon, config, None, None)
    else:
        link = (FP32Optimizer if exchange is None else _OwnedMuonFP32)(muon, config, None)
    if exchange is not None:
        link.exchange = exchange
    link.grad_stats_parallel_group = pgs.collection.mp if exchange is None else pgs.collection.intra_dist_opt
    link.tp_group = pgs.tp
    return link


class OwnedMuon:
    """Mixin for Megatron's optimizers: each data-parallel rank updates only the matrices that it owns."""

    exchange: MatrixExchange

    def prepare_grads(self) -> bool:
        """Collect the whole gradients of the matrices on their owners."""
        self.exchange.gradients_to_owners()
        return super().prepare_grads()

    def step_with_ready_grads(self) -> bool:
        """Step, and write the new weights into the shards from which Megatron's distributed optimizer gathers them."""
        has_stepped = super().step_with_ready_grads()
        self.exchange.weights_to_shards()
        return has_stepped


class _OwnedMuonBF16(OwnedMuon, Float16OptimizerWithFloat16Params):
    """Muon with fp32 masters of this rank's own bf16 matrices."""


class _OwnedMuonFP32(OwnedMuon, FP32Optimizer):
    """Muon on this rank's own fp32 matrices."""


def _sliced_dim(weight: Tensor) -> int | None:
    # Megatron's parallel linears mark their weights, and master copies inherit the mark. Plain parameters have none.
    if not getattr(weight, "tensor_model_parallel", False):
        return None
    return weight.partition_dim
