"""Statistics of layer memory's routing weights per layer and source state, over all tokens (paper Figure 6).

Tokens of the first latent frame, whose content is given, are counted apart from the others, which are generated.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig
from megatron_fsvideo.models.dit.layer_memory import LayerMemory
from megatron_fsvideo.models.dit.tokens import round_up, token_grid
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_max, all_reduce_sum
from megatron_fsvideo.parallel.sequence import local_slice

KINDS = ("first frame", "other frames")
_PADDING = len(KINDS)


class RouterWeights:
    """Maxima and sums of routing weights over the tokens that pass through the layers of this rank.

    Raises:
        ValueError: a model without layer memory, or of one layer, has no router.
    """

    def __init__(self, model: DiTConfig, parallel: DiTParallelConfig, pgs: ProcessGroups) -> None:
        if not model.layer_memory or model.num_layers < 2:
            raise ValueError("only models with layer memory and at least two layers have routing weights")
        self._model, self._parallel, self._pgs = model, parallel, pgs
        rows, columns = model.num_layers - 1, model.num_layers
        self._sums = torch.zeros(len(KINDS), rows, columns, dtype=torch.float64, device=pgs.device)
        self._maxima = torch.zeros_like(self._sums)
        self._counts = torch.zeros(len(KINDS), rows, 1, dtype=torch.float64, device=pgs.device)

    @contextmanager
    def recording(self, modules: nn.Module, latent_shape: tuple[int, int, int]) -> Iterator[None]:
        """Context in which the routers' weights of `modules` (one model or several chunks) are counted.

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

    def maximum(self) -> Tensor:
        """Greatest weights over all tokens of all ranks [2, layers - 1, layers], fp32 on the CPU; all ranks call this.

        First the first frame's tokens, then the others; rows are the layers from 2, columns the states X_0, X_1, ...;
        NaN where a layer cannot read a state, or where there was no such token (images have no other frames).
        """
        return self._readable(all_reduce_max(self._maxima.clone()), all_reduce_sum(self._counts.clone()))

    def mean(self) -> Tensor:
        """Mean weights over all tokens, laid out as those of `maximum`; all ranks call this."""
        # Tokens that several tensor-parallel ranks see count as often in both sums.
        sums, counts = all_reduce_sum(self._sums.clone()), all_reduce_sum(self._counts.clone())
        return self._readable(sums / counts, counts)

    def _readable(self, values: Tensor, counts: Tensor) -> Tensor:
        columns = torch.arange(values.shape[-1], device=values.device)
        is_read = (columns <= columns[1:, None]) & (counts > 0)  # layer l reads X_0 .. X_{l-1}
        return torch.where(is_read, values, torch.nan).float().cpu()

    @torch.no_grad()
    def _add(self, memory: LayerMemory, query_source: Tensor, kinds: Tensor) -> None:
        # A layer that is recomputed adds its tokens twice, to sums and counts alike.
        weights = memory.weights(query_source)  # (s, b, l)
        sums, maxima = weights.sum(1).double(), weights.amax(1).double()  # (s, l)
        row, batch = memory.num_states - 2, query_source.shape[1]
        for kind in range(len(KINDS)):
            chosen = kinds == kind
            self._sums[kind, row, : memory.num_states] += sums[chosen].sum(0)
            found = self._maxima[kind, row, : memory.num_states]
            torch.maximum(found, maxima.masked_fill(~chosen[:, None], 0).amax(0), out=found)
            self._counts[kind, row] += batch * chosen.sum()

    def _kinds_of_tokens(self, latent_shape: tuple[int, int, int]) -> Tensor:
        """Index into KINDS [s] of this rank's tokens, padded and shared as the model does it."""
        t, h, w = token_grid(latent_shape, self._model.patch_size)
        kinds = local_slice((torch.arange(t * h * w, device=self._pgs.device) >= h * w).int(), 0, self._pgs.cp)
        is_shared, multiple = self._parallel.sequence_parallel, self._parallel.token_multiple
        length = round_up(len(kinds), multiple * (self._pgs.tp.size() if is_shared else 1))
        kinds = F.pad(kinds, (0, length - len(kinds)), value=_PADDING)
        return local_slice(kinds, 0, self._pgs.tp) if is_shared else kinds
