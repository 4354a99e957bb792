"""Moves weights between decoder kinds: causal (phases 1-4) -> Standard (5) -> Lite (6) (paper section 2.2.3).

The encoder does not change. A causal kernel's taps see frames (t-2, t-1, t), a center or group-causal kernel's
(t-1, t, t+1): copied as they are, each convolution would look one frame ahead. So (w0, w1, w2) becomes (w0+w1, w2, 0),
which equals the old kernel wherever features do not move.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae.convolutions import VideoConv3d
from megatron_fsvideo.models.fsae.model import FSAE


@torch.no_grad()
def inherit(target: FSAE, source: FSAEConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy an earlier phase's weights into `target`, in place; what does not fit keeps its initial values.

    Args:
        source: configuration that `weights` belong to.
        weights: its whole state dict.

    Returns:
        names of the tensors that start fresh: first-frame attention after a causal decoder, and whatever touches a
        stage whose width changes.

    Raises:
        ValueError: back to a causal decoder, or an encoder that does not take all of its weights.
    """
    if target.config.decoder == "causal" and source.decoder != "causal":
        raise ValueError(f"a {source.decoder} decoder cannot become causal: start from the phase before")
    remap = source.decoder == "causal" and target.config.decoder != "causal"
    kernels = _decoder_kernels(target) if remap else set()
    fresh = []
    for name, tensor in target.state_dict().items():
        value = weights.get(name)
        if value is None or value.shape != tensor.shape:
            fresh.append(name)
        else:
            tensor.copy_(causal_to_center(value) if name in kernels else value)
    if lost := [name for name in fresh if name.startswith("encoder.")]:
        raise ValueError(
            f"{len(lost)} encoder weights do not fit ({', '.join(lost[:3])}): only the decoder changes between phases; "
            "give the same widths, encoder_depths and latent_channels"
        )
    return fresh


def causal_to_center(kernel: Tensor) -> Tensor:
    """[o, i, 3, 3, 3]: taps for frames (t-2, t-1, t) -> taps for frames (t-1, t, t+1)."""
    oldest, previous, present = kernel.unbind(dim=2)
    return torch.stack([oldest + previous, present, torch.zeros_like(present)], dim=2)


def _decoder_kernels(fsae: FSAE) -> set[str]:
    """Names of the decoder's kernels over time."""
    convolutions = (name for name, module in fsae.decoder.named_modules() if isinstance(module, VideoConv3d))
    return {f"decoder.{name}.weight" for name in convolutions}
