"""Which kernels mix the states of layer memory on this machine."""

import torch

import megatron_fsvideo.kernels.torch_mixing as torch_mixing
from megatron_fsvideo.config import require
from megatron_fsvideo.kernels.mixing import Mixer


def mixer_for(implementation: str, device: torch.device) -> Mixer:
    """The kernels behind `--layer-memory-kernel`: torch, triton, or auto, which is Triton's on CUDA.

    Raises:
        ImportError: Triton is asked for and missing.
    """
    if implementation == "auto":
        implementation = "triton" if device.type == "cuda" else "torch"
    if implementation == "torch":
        return torch_mixing
    require("triton", "kernels")
    import megatron_fsvideo.kernels.triton_mixing as triton_mixing

    return triton_mixing
