"""How a job is spread over processes: Megatron-LM's names and meanings."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple


class GroupSizes(NamedTuple):
    """Numbers of ranks along each axis of a layout."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_stages: int | None = None
    """Model chunks of a pipeline rank; None is one."""
    hierarchical_context: tuple[int, ...] = ()
    """Sizes whose product is `context`, for exchanges in two levels."""

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.context * self.pipeline


@dataclass(frozen=True)
class ParallelConfig:
    """data and context parallelism, recomputation (all jobs)"""

    context_parallel_size: int = 1
    """Number of ranks that share the tokens or frames of each sample."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer's state among the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Start to reduce gradients while the backward pass still runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute activations again in the backward pass, which saves memory: those of whole layers or blocks (full), or of
    recompute_modules only (selective; DiT)."""
    distributed_timeout_minutes: float = 10
    """Time after which a run ends if a rank makes no progress; the message names the ranks that are waited for."""

    def __post_init__(self) -> None:
        if self.context_parallel_size < 1:
            raise ValueError(f"context_parallel_size must be at least 1, got {self.context_parallel_size}")

    @property
    def group_sizes(self) -> GroupSizes:
        """Ranks along each axis."""
        return GroupSizes(context=self.context_parallel_size)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.group_sizes.model


@dataclass(frozen=True)
class DiTParallelConfig(ParallelConfig):
    """tensor, sequence, context, pipeline and data parallelism, numerics (DiT)"""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that share the layers."""
    cp_comm_type: Literal["a2a", "p2p", "all_gather", "a2a+p2p"] = "a2a"
    """What they exchange: heads (Ulysses all-to-all); with Transformer Engine also keys and values, in a ring (p2p) or
    all at once (all_gather), or heads among near ranks and keys and values among far ones (a2a+p2p)."""
    hierarchical_context_parallel_sizes: tuple[int, ...] = ()
    """With cp_comm_type a2a+p2p: ranks that exchange heads, and groups of them that exchange keys and values."""
    sequence_parallel: bool = False
    """Share the tokens over the tensor-parallel ranks outside the linear layers."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when stages are uneven; none shares all layers evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when stages are uneven; none shares all layers evenly."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks per pipeline rank: smaller bubbles, more messages; none is one."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """The same by the layers of a chunk, instead of the number of chunks; the stages are then even."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recomputation of all layers, or (block) of the first recompute_num_layers of each stage."""
    recompute_num_layers: int = 1
    """With uniform: layers recomputed at once (with layer memory always one); with block: layers recomputed."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What selective recomputation recomputes, of core_attn and mlp."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Which linears, norms and attention: torch's (local) or Transformer Engine's."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply the matrices of attention and feed-forward in FP8 (Transformer Engine, bf16): all tensors in e4m3, or
    output gradients in e5m2 (hybrid); none does not."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scales of FP8: of the tensor at hand, of its last values (delayed; they start anew with every process), of blocks
    of 128 (compute capability 9.0, CUDA 12.9), of 32 values (mxfp8, compute capability 10.0)."""
    fp8_margin: int = 0
    """Binary orders of magnitude that delayed scaling leaves free."""
    fp8_amax_history_len: int = 1
    """Iterations whose largest values delayed scaling remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of them gives the delayed scale."""
    layer_memory_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What mixes layer memory: Triton's kernels, plain torch, or Triton's on CUDA and torch elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel shares tokens over tensor_model_parallel_size ranks, which is 1")

        virtual = self.num_virtual_stages_per_pipeline_rank
        if virtual is not None and (virtual < 2 or self.pipeline_model_parallel_size < 2):
            raise ValueError(
                f"num_virtual_stages_per_pipeline_rank {virtual} with pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size}: both must be at least 2, or leave the first out"
            )
        self._check_layers_per_chunk()
        self._check_transformer_impl()
        if self.recompute_num_layers < 1:
            raise ValueError(f"recompute_num_layers must be at least 1, got {self.recompute_num_layers}")
        if unknown := set(self.recompute_modules) - {"core_attn", "mlp"}:
            raise ValueError(f"recompute_modules takes core_attn and mlp, got {' '.join(sorted(unknown))}")

    def _check_layers_per_chunk(self) -> None:
        layers = self.num_layers_per_virtual_pipeline_stage
        if layers is None:
            return
        if self.num_virtual_stages_per_pipeline_rank is not None:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {layers} and num_virtual_stages_per_pipeline_rank "
                f"{self.num_virtual_stages_per_pipeline_rank} say the same thing in two ways: give one of them"
            )
        if layers < 1 or self.pipeline_model_parallel_size < 2:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {layers} with pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size}: at least 1 and 2, or leave the first out"
            )
        ends = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        if any(end is not None for end in ends):
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {layers} is for even pipeline stages: with "
                "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage give "
                "num_virtual_stages_per_pipeline_rank"
            )

    def _check_transformer_impl(self) -> None:
        if self.transformer_impl == "local":
            if self.fp8_format is not None:
                raise ValueError(f"fp8_format {self.fp8_format} needs transformer_impl transformer_engine, not local")
            if self.cp_comm_type != "a2a":
                raise ValueError(
                    f"cp_comm_type {self.cp_comm_type} needs transformer_impl transformer_engine; local has a2a only"
                )
        if self.fp8_amax_history_len < 1:
            raise ValueError(f"fp8_amax_history_len must be at least 1, got {self.fp8_amax_history_len}")
        sizes = self.hierarchical_context_parallel_sizes
        if (self.cp_comm_type == "a2a+p2p") != bool(sizes):
            raise ValueError(
                f"cp_comm_type is {self.cp_comm_type} and hierarchical_context_parallel_sizes is {list(sizes)}: "
                "a2a+p2p needs two sizes, the others none"
            )
        if sizes and (len(sizes) != 2 or min(sizes) < 1 or math.prod(sizes) != self.context_parallel_size):
            raise ValueError(
                f"hierarchical_context_parallel_sizes {' '.join(map(str, sizes))} must be two sizes whose product is "
                f"context_parallel_size {self.context_parallel_size}"
            )

    @property
    def num_ranks_sharing_heads(self) -> int:
        """Context-parallel ranks that deal the heads out among themselves in attention."""
        if self.cp_comm_type == "a2a+p2p":
            return self.hierarchical_context_parallel_sizes[0]
        return self.context_parallel_size if self.cp_comm_type == "a2a" else 1

    @property
    def fp8_multiple(self) -> int:
        """What FP8's matrix products want rows and columns to be a multiple of; 1 without FP8."""
        if self.fp8_format is None:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def token_multiple(self) -> int:
        """The tokens of every rank, and the text's and the image's, are padded to a multiple of this."""
        if self.fp8_format is not None and self.fp8_recipe == "blockwise" and self.sequence_parallel:
            return 128  # Transformer Engine gathers whole blocks
        return self.fp8_multiple

    @property
    def num_chunks(self) -> int:
        """Model chunks that each pipeline rank holds."""
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def group_sizes(self) -> GroupSizes:
        """Ranks along each axis."""
        return GroupSizes(
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.pipeline_model_parallel_size,
            self.num_virtual_stages_per_pipeline_rank,
            self.hierarchical_context_parallel_sizes,
        )
