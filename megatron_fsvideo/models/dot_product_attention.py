"""softmax(q k^T / sqrt(d)) v in both directions, by the fastest kernel that is installed and takes the tensors.

On CUDA in bf16 or fp16: FlashAttention 3 on Hopper, FlashAttention 2 from Ampere on; where they are missing, torch's
fused attention, cuDNN's kernel before its own flash kernel. Everywhere else torch chooses.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionType = Literal["self", "cross"]
Kernel = Literal["flash3", "flash2", "sdpa"]

MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn"}
MAX_HEAD_DIM = 256  # of both FlashAttentions; channels come in eights
# In the order in which they are tried: the last takes whatever the others refuse.
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in Megatron's layout: query [s, b, n, d], key and value [l, b, n, d] -> [s, b, n, d]."""
    kernel = choose_kernel(query.device, query.dtype, query.shape[-1])
    if kernel == "sdpa":
        return _torch_attention(query, key, value)
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))  # (b, s, n, d)
    attended = _flash_function(kernel)(query, key, value)
    # Some releases of FlashAttention 3 return the softmax's normaliser too.
    return (attended[0] if isinstance(attended, tuple) else attended).transpose(0, 1)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel for tensors of this kind on this machine."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return "sdpa"
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9 and _is_installed(MODULES["flash3"]):
        return "flash3"
    if major >= 8 and _is_installed(MODULES["flash2"]):
        return "flash2"
    return "sdpa"


def _torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # (b, n, s, d)
    with sdpa_kernel(SDPA_ORDER, set_priority=True) if query.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3)


@cache
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


@cache
def _flash_function(kernel: str) -> Callable:
    return import_module(MODULES[kernel]).flash_attn_func
