"""Self- and cross-attention of a DiT layer, with RMS norms over the full width of queries and keys.

Under tensor parallelism each rank holds the columns of some heads. The norms run over all heads, so ranks add up their
sums of squares: one small collective per attention, however many tensors are normed.

Padding (see `DiTModel`) goes through the linears, whose matrix products want it, and nothing else: it is cut off behind
the projections and put back, as zeros, before the output projection. No attention, whatever its mask or its exchange
between ranks, ever sees it.

Letters: s tokens of this rank inside the tensor-parallel region, l context tokens, b samples, n heads of this rank,
d channels of a head.
"""

from copy import copy
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.models.dit.embeddings import Context
from megatron_fsvideo.models.dit.recompute import run_part
from megatron_fsvideo.models.dit.rope import Rotary, apply_rotary
from megatron_fsvideo.models.dit.tokens import append_rows
from megatron_fsvideo.parallel.marks import mark_sliced
from megatron_fsvideo.parallel.sequence import enter_tensor_parallel, sum_over_ranks


@dataclass
class AttentionSubmodules:
    """The parts a backend provides."""

    entered_linear: ModuleSpec | type
    row_parallel_linear: ModuleSpec | type
    core_attention: ModuleSpec | type


class FullWidthRMSNorm(MegatronModule):
    """RMS norm over all heads together; this rank has the gain of its own heads.

    The name keeps clear of `q_layernorm` and `k_layernorm`: Megatron sums the gradients of parameters so named over the
    tensor-parallel group, which would mix the gains of different heads.
    """

    def __init__(self, config: TransformerConfig, tp_group: ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.width = config.hidden_size
        self.weight = nn.Parameter(torch.ones(self.width // tp_group.size(), dtype=config.params_dtype))
        mark_sliced(self.weight, dim=0)

    def forward(self, projected: Tensor, sum_of_squares: Tensor) -> Tensor:
        """projected [s, b, n * d] and its sum of squares over all ranks [s, b, 1] -> the same shape and dtype."""
        scale = torch.rsqrt(sum_of_squares / self.width + self.config.layernorm_epsilon)
        return (projected.float() * scale).to(projected.dtype) * self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The gain is cut along its only axis."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def normalize(norms: list[FullWidthRMSNorm], projected: list[Tensor]) -> list[Tensor]:
    """Apply one norm to each tensor [*, b, n * d], with one collective for all of them."""
    sums = [tensor.float().square().sum(-1, keepdim=True) for tensor in projected]
    total = sum_over_ranks(torch.cat(sums), norms[0].tp_group)
    lengths = [len(tensor) for tensor in projected]
    pairs = zip(norms, projected, total.split(lengths), strict=True)
    return [norm(tensor, sum_of_squares) for norm, tensor, sum_of_squares in pairs]


class Attention(MegatronModule):
    """Base of self- and cross-attention: builds their linears and divides the heads."""

    def __init__(
        self, config: TransformerConfig, submodules: AttentionSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.submodules = submodules
        self.tp_group = pg_collection.tp
        self.head_dim = config.kv_channels
        self.linear_proj = build_module(
            submodules.row_parallel_linear,
            config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _linear(self) -> nn.Module:
        """A projection to this rank's heads. Its input has entered the tensor-parallel region already."""
        config = copy(self.config)
        config.sequence_parallel = False
        return build_module(
            self.submodules.entered_linear,
            self.config.hidden_size,
            self.config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _norm(self) -> FullWidthRMSNorm:
        return FullWidthRMSNorm(self.config, self.tp_group)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))  # (s, b, n * d) -> (s, b, n, d)


class SelfAttention(Attention):
    """Attention over the tokens; queries may come from another source than keys and values (layer memory)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection)
        assert cp_comm_type in (None, config.cp_comm_type), "one exchange for all layers"
        self.linear_q, self.linear_k, self.linear_v = (self._linear() for _ in range(3))
        self.norm_q, self.norm_k = self._norm(), self._norm()
        self.core_attention = build_module(submodules.core_attention, config, layer_number, "self", pg_collection)

    def forward(self, query_source: Tensor, key_value_source: Tensor, rotary: Rotary) -> Tensor:
        """Both sources [s, b, h] (cut over the tensor-parallel group with sequence parallelism) -> the same shape.

        The rotary tables are those of the real tokens; what follows these is padding.
        """
        query_source, key_value_source = self._enter(query_source, key_value_source)
        num_rows, num_tokens = len(query_source), len(rotary[0])
        query, key, value = (
            linear(source)[0][:num_tokens]
            for linear, source in (
                (self.linear_q, query_source),
                (self.linear_k, key_value_source),
                (self.linear_v, key_value_source),
            )
        )
        query, key = normalize([self.norm_q, self.norm_k], [query, key])
        query, key = (apply_rotary(self._heads(tensor), rotary) for tensor in (query, key))
        attended = run_part(self.config, "core_attn", self.core_attention, query, key, self._heads(value))
        return self.linear_proj(append_rows(attended, num_rows))[0]

    def _enter(self, query_source: Tensor, key_value_source: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both sources into the tensor-parallel region with one collective."""
        sequence_parallel = self.config.sequence_parallel
        if key_value_source is query_source:
            entered = enter_tensor_parallel(query_source, sequence_parallel, self.tp_group)
            return entered, entered
        if self.tp_group.size() == 1:
            return query_source, key_value_source
        both = torch.cat([query_source, key_value_source], dim=1)
        query_source, key_value_source = enter_tensor_parallel(both, sequence_parallel, self.tp_group).chunk(2, dim=1)
        return query_source, key_value_source


class CrossAttention(Attention):
    """Attention to the text and to the image, each with a softmax of its own; the results are added.

    The context is whole on every rank. Padded text rows are attended to, as in Wan.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        has_text: bool,
        has_image: bool,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config, submodules, pg_collection)
        self.linear_q, self.norm_q = self._linear(), self._norm()
        self.text = _ContextProjection(self._linear(), self._linear(), self._norm()) if has_text else None
        self.image = _ContextProjection(self._linear(), self._linear(), self._norm()) if has_image else None
        self.core_attention = build_module(submodules.core_attention, config, layer_number, "cross", pg_collection)

    def forward(self, hidden_states: Tensor, text: Context | None, image: Context | None) -> Tensor:
        """hidden_states [s, b, h] and contexts [l, b, h] -> [s, b, h].

        Padded tokens attend too: to cut them off, as self-attention must, would only cost a copy.
        """
        entered = enter_tensor_parallel(hidden_states, self.config.sequence_parallel, self.tp_group)
        parts = [(part, context) for part, context in ((self.text, text), (self.image, image)) if part is not None]
        keys = [part.linear_k(context.rows)[0][: context.length] for part, context in parts]
        values = [self._heads(part.linear_v(context.rows)[0][: context.length]) for part, context in parts]
        norms = [self.norm_q, *(part.norm_k for part, _ in parts)]
        query, *keys = map(self._heads, normalize(norms, [self.linear_q(entered)[0], *keys]))
        attended = [
            run_part(self.config, "core_attn", self.core_attention, query, key, value)
            for key, value in zip(keys, values, strict=True)
        ]
        return self.linear_proj(sum(attended[1:], attended[0]))[0]


class _ContextProjection(MegatronModule):
    """Keys and values of one kind of context."""

    def __init__(self, linear_k: nn.Module, linear_v: nn.Module, norm_k: FullWidthRMSNorm) -> None:
        super().__init__(norm_k.config)
        self.linear_k, self.linear_v, self.norm_k = linear_k, linear_v, norm_k
