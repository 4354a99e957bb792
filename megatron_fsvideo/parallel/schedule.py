"""Megatron's pipeline schedules over the micro-batches of an iteration."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.groups import ProcessGroups, broadcast_object, broadcast_tensor


def run_schedule(
    forward_step: Callable, chunks: list[nn.Module], batches: list, pgs: ProcessGroups, *, forward_only: bool = False
) -> list[dict[str, Any]]:
    """Forward and, unless `forward_only`, backward of every micro-batch.

    Args:
        forward_step: Megatron's: (iterator over batches, chunk) -> (output, loss function).
        chunks: this rank's model, in Megatron's DDP if it is trained; several with virtual pipeline stages.

    Returns:
        what the loss functions returned, on the last stage; elsewhere nothing.
    """
    communication = {}
    if len(chunks) > 1:
        communicator = VirtualStageCommunicator(pgs.pp, get_model_config(chunks[0]))
        communicator.has_one_group = len(batches) == pgs.pp_size
        communication = {"p2p_communicator": communicator, "pg_collection": pgs.collection}
    with megatron_on_cpu():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=1,  # stages tell each other the shapes
            micro_batch_size=1,
            forward_only=forward_only,
            **communication,
        )


def finalize_gradients(chunks: list[DistributedDataParallel], pgs: ProcessGroups) -> None:
    """Reduce the gradients that were accumulated without a schedule, as the schedules do at their end.

    They are averaged over the copies of the weights. With sequence parallelism, those of replicas that saw only their
    own tokens are summed over the tensor-parallel ranks; those of shared embedders are summed over the stages.
    """
    with megatron_on_cpu():
        finalize_model_grads(chunks, pg_collection=pgs.collection)


def share_from_last_stage(tensors: list[Tensor], pgs: ProcessGroups) -> list[Tensor]:
    """The last pipeline stage's tensors, on every stage. No gradient flows.

    Args:
        tensors: on the last stage; elsewhere nothing is read from it.
    """
    if pgs.pp_size == 1:
        return tensors
    last = pgs.pp_size - 1
    outlines = broadcast_object([(t.shape, t.dtype) for t in tensors] if pgs.is_last_stage else None, pgs.pp, last)
    if not pgs.is_last_stage:
        tensors = [torch.empty(shape, dtype=dtype, device=pgs.device) for shape, dtype in outlines]
    return [broadcast_tensor(tensor, pgs.pp, last) for tensor in tensors]


class VirtualStageCommunicator(P2PCommunicator):
    """Megatron's messages between virtual stages, in an order in which no two ranks wait for each other.

    **Two ranks.** The next stage is also the previous one, and messages between two ranks match in the order of
    posting. Megatron posts those with the previous stage first; here the second rank posts those with the next stage
    first, so that what it receives from there is what was sent to it.

    **As many micro-batches as ranks.** The first ranks then do all forward passes before any backward pass, and
    exchange outputs alone where their neighbours exchange outputs and gradients in one go, of which the shapes come
    first: the gradient's shape would wait for the neighbour's next exchange, and that for the output, which follows
    the shapes. Here outputs are exchanged first and gradients second.

    Attributes:
        has_one_group: whether the iteration has as many micro-batches as the pipeline has ranks.
    """

    has_one_group = False

    def send_forward_backward_recv_forward_backward(
        self,
        output_tensor: Tensor | None,
        input_tensor_grad: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.has_one_group:
            return super().send_forward_backward_recv_forward_backward(
                output_tensor, input_tensor_grad, recv_prev, recv_next, tensor_shape
            )
        received = self.send_forward_recv_forward(output_tensor, recv_prev, tensor_shape)
        return received, self.send_backward_recv_backward(input_tensor_grad, recv_next, tensor_shape)

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        settings = {"tensor_shape": tensor_shape, "wait_on_reqs": wait_on_reqs}
        if self.pp_group.size() > 2 or self.pp_group.rank() == 0:
            return super()._communicate(
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                recv_prev=recv_prev,
                recv_next=recv_next,
                **settings,
            )
        from_next, from_previous, requests = super()._communicate(
            tensor_send_next=tensor_send_prev,
            tensor_send_prev=tensor_send_next,
            recv_prev=recv_next,
            recv_next=recv_prev,
            **settings,
        )
        return from_previous, from_next, requests
