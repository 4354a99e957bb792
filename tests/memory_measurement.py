"""What a training step of a planned case really takes: this rank's bytes from the allocator and bytes sent."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fsvideo.benchmarking.peak_memory import profiled_allocation
from megatron_fsvideo.config import OptimizerConfig
from megatron_fsvideo.models.dit import build_dit, patchify
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.optim.optimizer import build_optimizer, step_if_finite, wrap_ddp
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.schedule import run_schedule
from megatron_fsvideo.parallel.sequence import local_slice
from megatron_fsvideo.planning.case import Case


class CountMessages(TorchDispatchMode):
    """Sums up the bytes that a rank sends, as planning/communication.py counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            self._count(name, args, torch.distributed.ProcessGroup.unbox(boxed).size())
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple, group_size: int) -> None:
        def nbytes(tensors: Tensor | list[Tensor]) -> int:
            return tensors.nbytes if isinstance(tensors, Tensor) else sum(tensor.nbytes for tensor in tensors)

        share = (group_size - 1) / group_size
        if name in ("allreduce_", "allreduce_coalesced_"):
            self.num_bytes += 2 * share * nbytes(args[0])
        elif name in ("_allgather_base_", "allgather_into_tensor_coalesced_"):
            self.num_bytes += share * nbytes(args[0])
        elif name in ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "alltoall_base_"):
            self.num_bytes += share * nbytes(args[1])
        elif name == "send":
            self.num_bytes += nbytes(args[0])
        else:
            assert name in ("recv_", "barrier", "broadcast_"), f"c10d::{name} is not counted"


def measure(case: Case, grid: tuple[int, int, int]) -> dict[str, float]:
    """This rank's bytes: static ones by part, the peak of the second step over them, and what a step sends."""
    pgs = groups.initialize(case.parallel)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    settings = OptimizerConfig()
    model, weights, _ = profiled_allocation(lambda: build_dit(case.model, case.parallel, pgs, params_dtype=dtype))
    (wrapped,), gradients, _ = profiled_allocation(lambda: wrap_ddp([model], model.config, case.parallel, pgs))
    rules = dit_parameter_rules([model], settings.router_lr_mult)
    optimizer, master, _ = profiled_allocation(lambda: build_optimizer([wrapped], settings, rules, pgs))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    batches = [random_batch(case, grid) for _ in range(case.num_microbatches)]

    def forward_step(iterator, chunk):
        batch = next(iterator)
        target = local_slice(batch["target"], 1, pgs.cp)
        prediction = chunk(batch["model_input"], batch["timesteps"], batch["text"], batch["image"])

        def loss_function(prediction):
            loss = (prediction - target).square().mean()
            return loss, {"loss": loss.detach().clone()}

        return prediction, loss_function

    def step():
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(forward_step, [wrapped], batches, pgs)

    def update():
        assert step_if_finite(optimizer, 0.0, pgs)[1]

    step()
    _, moments, _ = profiled_allocation(update)
    # The profiler sees no freeing in gloo's threads, and on a busy machine one of them may be the last to let go of a
    # message's buffer: such bytes count twice. The least of several steps is free of them.
    peak = min(profiled_allocation(step)[2] for _ in range(4))
    _, _, update_peak = profiled_allocation(update)
    with CountMessages() as messages:
        step()
        update()
    groups.shutdown()
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer state": master + moments,
        "activations": peak,
        "update": update_peak,
        "messages": messages.num_bytes,
    }


def random_batch(case: Case, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """A micro-batch, with its target as tokens."""
    model, samples = case.model, case.micro_batch_size
    target = torch.randn(samples, model.latent_channels, *grid)
    return {
        "model_input": torch.randn(samples, model.in_channels, *grid),
        "timesteps": torch.linspace(10.0, 900.0, samples),
        "text": torch.randn(samples, case.rows.text, model.text_embed_dim),
        "image": torch.randn(samples, case.rows.image, model.image_embed_dim),
        "target": patchify(target, model.patch_size),
    }
