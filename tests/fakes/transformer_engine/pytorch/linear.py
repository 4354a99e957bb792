"""The linear: column parallel, row parallel or alone; in FP8 where the process is in that state."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.base import Module, mark
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, check_shape, rounded


class _FP8Product(torch.autograd.Function):
    """x w^T of rounded factors; the gradients of rounded factors too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, weight_in_fp8: Tensor, formats: tuple[str, str]) -> Tensor:
        x = rounded(x, formats[0])
        ctx.save_for_backward(x, weight_in_fp8)
        ctx.gradient_format = formats[1]
        return x @ weight_in_fp8.t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = rounded(gradient, ctx.gradient_format)
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2), None, None


class Linear(Module):
    """y = x A^T + b"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert bias and not fuse_wgrad_accumulation and get_rng_state_tracker is None
        self.tp_group = tp_group
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.return_bias = return_bias
        self.ran_in_fp8 = False
        self._weight_in_fp8: Tensor | None = None
        if parallel_mode == "column":
            out_features //= self.tp_size
        elif parallel_mode == "row":
            in_features //= self.tp_size
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        assert init_method is not None
        init_method(self.weight)
        mark(self.weight, 1 if parallel_mode == "row" else 0)
        if parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif parallel_mode == "column":
            mark(self.bias, 0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., in_features] -> [..., out_features], and the bias where that is not added."""
        assert inp.dtype == self.weight.dtype, f"{inp.dtype} meets weights in {self.weight.dtype}"
        product = self._exchange_output(self._product(self._exchange_input(inp), is_first_microbatch))
        return (product, self.bias) if self.return_bias else product + self.bias

    def _product(self, x: Tensor, is_first_microbatch: bool | None) -> Tensor:
        if not FP8GlobalStateManager.enabled:
            return F.linear(x, self.weight)
        check_shape(x)
        check_shape(self.weight)
        self.ran_in_fp8 = True
        formats = FP8GlobalStateManager.recipe.fp8_format.value
        if self._weight_in_fp8 is None or is_first_microbatch is not False:
            self._weight_in_fp8 = rounded(self.weight.detach(), formats[0])
        return _FP8Product.apply(x, self.weight, self._weight_in_fp8, formats)

    def _exchange_input(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.tp_size == 1 or self.parallel_mode != "column":
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _exchange_output(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.tp_size == 1 or self.parallel_mode != "row":
            return x
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(x, group=self.tp_group)
