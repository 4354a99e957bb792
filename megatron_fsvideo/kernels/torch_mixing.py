"""The kernels of layer memory in plain torch: the reference for Triton's, and what runs without CUDA.

States are added up one by one: no stack of them is ever made.
"""

import torch
from torch import Tensor

from megatron_fsvideo.kernels.mixing import MixResult, MixSettings


def mix(logits: Tensor, states: list[Tensor], shift: Tensor, scale: Tensor, settings: MixSettings) -> MixResult:
    """Mix, norm and modulate the states (`Mixer.mix` defines arguments and result)."""
    weights = torch.softmax(logits, dim=-1)
    sources = (_layer_norm(state, settings.epsilon)[0] if settings.norms_states else state for state in states)
    memory = torch.zeros_like(states[0], dtype=torch.promote_types(states[0].dtype, torch.float32))
    for index, source in enumerate(sources):
        memory.addcmul_(weights[..., index, None], source.to(memory.dtype))
    if settings.norms_states:
        normed, mean, rstd = memory, None, None
    else:
        memory = memory.to(states[0].dtype)
        normed, mean, rstd = _layer_norm(memory, settings.epsilon)
    output = (normed * (1 + scale) + shift).to(states[0].dtype)
    return MixResult(output, weights, memory, mean, rstd)


def mix_backward(
    gradient: Tensor, result: MixResult, states: list[Tensor], scale: Tensor, settings: MixSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of `mix` up to the mix itself (`Mixer.mix_backward` defines arguments and results)."""
    gradient = gradient.to(result.weights.dtype)
    shift_gradient = gradient.sum(0)
    normed = result.memory
    if not settings.norms_states:
        normed = (result.memory - result.mean[..., None]) * result.rstd[..., None]
    scale_gradient = (gradient * normed).sum(0)
    gradient = gradient * (1 + scale)
    if not settings.norms_states:
        gradient = _layer_norm_backward(gradient, normed, result.rstd)
    del normed
    weight_gradients = [
        ((_layer_norm(state, settings.epsilon)[0] if settings.norms_states else state) * gradient).sum(-1)
        for state in states
    ]
    weight_gradient = torch.stack(weight_gradients, dim=-1)  # (s, b, l)
    mean = (result.weights * weight_gradient).sum(-1, keepdim=True)
    logits_gradient = result.weights * (weight_gradient - mean)
    return gradient.to(states[0].dtype), logits_gradient, shift_gradient, scale_gradient


def pull(
    gradients: list[Tensor], index: int, reads: list[tuple[Tensor, Tensor]], state: Tensor, settings: MixSettings
) -> Tensor:
    """Whole gradient of one state from all its readers (`Mixer.pull` defines arguments and result)."""
    total = torch.zeros_like(state, dtype=torch.promote_types(state.dtype, torch.float32))
    for weights, mix_gradient in reads:
        total.addcmul_(weights[..., index, None], mix_gradient.to(total.dtype))
    if settings.norms_states:
        normed, _, rstd = _layer_norm(state, settings.epsilon)
        total = _layer_norm_backward(total, normed, rstd)
    for gradient in gradients:
        total += gradient
    return total.to(state.dtype)


def _layer_norm(tensor: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed [s, b, h], mean and reciprocal standard deviation [s, b]; at least fp32."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    normed, mean, rstd = torch.native_layer_norm(tensor, tensor.shape[-1:], None, None, epsilon)
    return normed, mean.squeeze(-1), rstd.squeeze(-1)


def _layer_norm_backward(gradient: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of what was normed, from that of `normed`."""
    along = (gradient * normed).mean(-1, keepdim=True)
    return (gradient - gradient.mean(-1, keepdim=True)).addcmul_(normed, -along).mul_(rstd[..., None])
