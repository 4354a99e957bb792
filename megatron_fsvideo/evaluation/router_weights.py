"""Where layer memory looks: the mean routing weight per layer and source state (paper Figure 6).

Tokens of the first latent frame, whose content is given, are counted apart from the others, which are generated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, require
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.models.dit.tokens import round_up, token_grid
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum
from megatron_fsvideo.parallel.sequence import local_slice

KINDS = ("first frame", "other frames")
_PADDING = len(KINDS)


class RouterWeights:
    """Sums of routing weights over the tokens that pass through the layers of this rank.

    Raises:
        ValueError: a model without layer memory, or of one layer, has no router.
    """

    def __init__(self, model: DiTConfig, parallel: DiTParallelConfig, pgs: ProcessGroups) -> None:
        if not model.layer_memory or model.num_layers < 2:
            raise ValueError("only models with layer memory and at least two layers have routing weights")
        self._model, self._parallel, self._pgs = model, parallel, pgs
        rows, columns = model.num_layers - 1, model.num_layers
        self._sums = torch.zeros(len(KINDS), rows, columns, dtype=torch.float64, device=pgs.device)
        self._counts = torch.zeros(len(KINDS), rows, 1, dtype=torch.float64, device=pgs.device)

    @contextmanager
    def recording(self, modules: nn.Module, latent_shape: tuple[int, int, int]) -> Iterator[None]:
        """Within this context, count what passes through the routers of `modules`, one model or several chunks.

        Args:
            latent_shape: latent frames, rows and columns of the samples that pass through.
        """
        kinds = self._kinds_of_tokens(latent_shape)

        def record(memory: LayerMemory, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._add(memory, inputs[0].detach(), kinds)

        routers = [module for module in modules.modules() if isinstance(module, LayerMemory)]
        handles = [router.register_forward_hook(record) for router in routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean(self) -> Tensor:
        """Mean weights [2, layers - 1, layers], fp32 on the CPU, over all ranks, each of which calls this.

        First the first frame's tokens, then the others; rows are the layers from 2, columns the states X_0, X_1, ...;
        NaN where a layer cannot read a state, or where there was no such token (images have no other frames).
        """
        # Tokens that several tensor-parallel ranks see count as often in both sums.
        sums, counts = all_reduce_sum(self._sums.clone()), all_reduce_sum(self._counts.clone())
        columns = torch.arange(sums.shape[-1], device=sums.device)
        is_read = columns <= columns[1:, None]  # layer l reads X_0 .. X_{l-1}
        return torch.where(is_read, sums / counts, torch.nan).float().cpu()

    @torch.no_grad()
    def _add(self, memory: LayerMemory, query_source: Tensor, kinds: Tensor) -> None:
        # A layer that is recomputed adds its tokens twice, to sums and counts alike.
        weights = memory.weights(query_source).sum(1).double()  # (s, l)
        row, batch = memory.num_states - 2, query_source.shape[1]
        for kind in range(len(KINDS)):
            chosen = kinds == kind
            self._sums[kind, row, : memory.num_states] += weights[chosen].sum(0)
            self._counts[kind, row] += batch * chosen.sum()

    def _kinds_of_tokens(self, latent_shape: tuple[int, int, int]) -> Tensor:
        """Index into KINDS [s] of this rank's tokens, padded and shared as the model does it."""
        t, h, w = token_grid(latent_shape, self._model.patch_size)
        kinds = local_slice((torch.arange(t * h * w, device=self._pgs.device) >= h * w).int(), 0, self._pgs.cp)
        is_shared, multiple = self._parallel.sequence_parallel, self._parallel.token_multiple
        length = round_up(len(kinds), multiple * (self._pgs.tp.size() if is_shared else 1))
        kinds = F.pad(kinds, (0, length - len(kinds)), value=_PADDING)
        return local_slice(kinds, 0, self._pgs.tp) if is_shared else kinds


def router_figure(weights: Tensor, title: str = "") -> Any:
    """A matplotlib figure of `RouterWeights.mean`'s result: a heat map for each kind of token, colours from 0 to 1."""
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
    figure.colorbar(image, ax=all_axes, label="mean routing weight")
    figure.suptitle(title)
    return figure


def write_router_figure(path: Path, weights: Tensor, title: str = "") -> None:
    """Write it as PNG."""
    router_figure(weights, title).savefig(path, dpi=120)


def router_pixels(weights: Tensor) -> Tensor:
    """The same as an image uint8 [height, width, 3]."""
    figure = router_figure(weights)
    canvas = require("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)[..., :3]
