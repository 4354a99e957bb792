"""Initial weights and names of the whole model, whatever part of it a rank holds.

Every weight is drawn whole from a generator of its own name and then cut: the same model starts under every layout.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.models.dit.layer_memory import identity_leaning_bias
from megatron_fsvideo.models.dit.model import DiTModel
from megatron_fsvideo.parallel.seeds import weight_generator


def named_global_parameters(model: DiTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """This stage's parameters under their names in the whole model (layers counted from 0 over all stages)."""
    first_layer = model.block.layers[0].layer_number - 1
    prefix = "block.layers."
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{first_layer + int(index)}.{rest}"
        yield name, parameter


def slice_of_whole(whole: Tensor, parameter: nn.Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a whole weight that a rank holds, by the mark on its parameter."""
    if tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    return whole.chunk(tp_size, dim=parameter.partition_dim)[tp_rank]


@torch.no_grad()
def initialize_weights(model: DiTModel, seed: int) -> None:
    """Set Wan2.1's initial weights (wan/modules/model.py, `init_weights`); routers start near the identity."""
    tp_rank, tp_size = model.pgs.tp_rank, model.pgs.tp_size
    for name, parameter in named_global_parameters(model):
        whole = initial_value(name, _whole_shape(parameter, tp_size), model.model_config, seed)
        parameter.copy_(slice_of_whole(whole, parameter, tp_rank, tp_size))


def initial_value(name: str, shape: tuple[int, ...], config: DiTConfig, seed: int) -> Tensor:
    """One rule per kind of weight, fp32. `name` and `shape` are those of the whole model's weight."""
    if name.endswith("layer_memory.router.bias"):
        value = torch.zeros(shape)
        value[-1] = identity_leaning_bias(shape[0], config.layer_memory_init)
        return value
    if name.endswith("bias") or "router" in name or name.startswith("head.proj_out"):
        return torch.zeros(shape)
    if name.endswith("self_attention.norm_q.weight"):
        return torch.full(shape, config.q_norm_init)
    if "norm" in name:
        return torch.ones(shape)
    generator = weight_generator(seed, name)
    if name.endswith("scale_shift_table"):
        return torch.randn(shape, generator=generator) / math.sqrt(config.hidden_size)
    if "time_embedder" in name or "text_embedder" in name:
        return 0.02 * torch.randn(shape, generator=generator)
    bound = math.sqrt(6 / sum(shape))  # Glorot & Bengio's uniform
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _whole_shape(parameter: nn.Parameter, tp_size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp_size
    return tuple(shape)
