"""Pictures of where layer memory looks (paper Figure 6)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.config import require
from megatron_fsvideo.models.dit.router_weights import KINDS


def router_figure(weights: Tensor, statistic: str, title: str = "") -> Any:
    """A matplotlib figure of the weights of `RouterWeights`: a heat map for each kind of token, colours from 0 to 1.

    Args:
        statistic: what was taken over the tokens, as `maximum`.
    """
    num_layers = weights.shape[-1]
    side = min(1.5 + 0.3 * num_layers, 8.0)
    figure = require("matplotlib.figure", "eval").Figure(figsize=(2 * side + 1.5, side + 0.5), layout="constrained")
    # No axes for a kind that there is none of.
    shown = [(name, part) for name, part in zip(KINDS, weights, strict=True) if not part.isnan().all()]
    all_axes = figure.subplots(1, len(shown), squeeze=False)[0]
    ticks = range(0, num_layers, 1 + num_layers // 16)
    for axes, (name, part) in zip(all_axes, shown, strict=True):
        image = axes.imshow(part.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set(title=f"tokens of the {name}", xlabel="state read (0: embedding)", ylabel="layer")
        axes.set_xticks(list(ticks))
        rows = [tick for tick in ticks if tick < num_layers - 1]
        axes.set_yticks(rows, [str(row + 2) for row in rows])
    figure.colorbar(image, ax=all_axes, label=f"{statistic} routing weight")
    figure.suptitle(title)
    return figure


def write_router_figure(path: Path, weights: Tensor, statistic: str, title: str = "") -> None:
    """Write a router figure as PNG."""
    router_figure(weights, statistic, title).savefig(path, dpi=120)


def router_pixels(weights: Tensor, statistic: str) -> Tensor:
    """A router figure as an image uint8 [height, width, 3]."""
    figure = router_figure(weights, statistic)
    canvas = require("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)[..., :3]
