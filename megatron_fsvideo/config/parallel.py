"""The parallel layout of a job, with Megatron-LM's names and meanings."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_fsvideo.config.rules import Checked, Count, Positive, PositiveInt


class GroupSizes(NamedTuple):
    """Number of ranks along each axis of a layout."""

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
class ParallelConfig(Checked):
    """data and context parallelism, recomputation (all jobs)"""

    context_parallel_size: PositiveInt = 1
    """Number of ranks that share the tokens or frames of each sample."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer's state among the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Start to reduce gradients while the backward pass still runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute activations again in the backward pass, which saves memory: full recomputes whole layers or blocks,
    selective recomputes only recompute_modules (DiT only). None keeps all activations."""
    distributed_timeout_minutes: Positive = 10
    """Minutes after which a run ends if a rank makes no progress. The message names the ranks that are waited for."""

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

    tensor_model_parallel_size: PositiveInt = 1
    """Number of ranks that share the weights of each layer."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Number of pipeline stages that share the layers."""
    cp_comm_type: Literal["a2a", "p2p", "all_gather", "a2a+p2p"] = "a2a"
    """What context-parallel ranks exchange in attention. a2a: heads (Ulysses). With Transformer Engine also p2p: keys
    and values in a ring; all_gather: keys and values at once; a2a+p2p: heads among near ranks, keys and values among
    distant ranks."""
    hierarchical_context_parallel_sizes: tuple[PositiveInt, ...] = ()
    """For cp_comm_type a2a+p2p, two sizes: ranks that exchange heads, and groups that exchange keys and values."""
    sequence_parallel: bool = False
    """Divide the tokens among the tensor-parallel ranks outside the linear layers."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Number of layers of the first pipeline stage. None gives it as many as the others."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Number of layers of the last pipeline stage. None gives it as many as the others."""
    num_virtual_stages_per_pipeline_rank: PositiveInt | None = None
    """Model chunks per pipeline rank. More chunks wait less and send more messages. None is one chunk."""
    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers per model chunk: another way to set the number of chunks, for pipeline stages of equal size."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Layers of full recomputation. uniform: all layers; block: the first recompute_num_layers layers of each stage."""
    recompute_num_layers: PositiveInt = 1
    """uniform: number of layers that are recomputed together (always one with layer memory). block: number of layers
    that are recomputed."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Modules of selective recomputation."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Library of the linear layers, norms and attention: local is torch."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the matrix products of attention and feed-forward in FP8 (needs Transformer Engine and bf16). e4m3: all
    tensors in E4M3; hybrid: output gradients in E5M2. None uses no FP8."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling factors of FP8. tensorwise: from the current tensor; delayed: from its values in earlier iterations
    (which each process collects anew); blockwise: per block of 128 values (compute capability 9.0, CUDA 12.9); mxfp8:
    per 32 values (compute capability 10.0)."""
    fp8_margin: Count = 0
    """Powers of two that delayed scaling keeps free above the largest value."""
    fp8_amax_history_len: PositiveInt = 1
    """Number of iterations whose largest values delayed scaling remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Remembered value that sets the delayed scaling factor."""
    layer_memory_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of layer memory's mixing. auto uses Triton on CUDA and torch elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def _check_layers_per_chunk(self) -> None:
        layers = self.num_layers_per_virtual_pipeline_stage
        if layers is None:
            return
        if self.num_virtual_stages_per_pipeline_rank is not None:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {layers} and num_virtual_stages_per_pipeline_rank "
                f"{self.num_virtual_stages_per_pipeline_rank} say the same thing in two ways: give one of them"
            )
        if self.pipeline_model_parallel_size < 2:
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage {layers} needs a pipeline_model_parallel_size of at least 2, "
                f"got {self.pipeline_model_parallel_size}"
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
        sizes = self.hierarchical_context_parallel_sizes
        if (self.cp_comm_type == "a2a+p2p") != bool(sizes):
            raise ValueError(
                f"cp_comm_type is {self.cp_comm_type} and hierarchical_context_parallel_sizes is {list(sizes)}: "
                "a2a+p2p needs two sizes, the others none"
            )
        if sizes and (len(sizes) != 2 or math.prod(sizes) != self.context_parallel_size):
            raise ValueError(
                f"hierarchical_context_parallel_sizes {' '.join(map(str, sizes))} must be two sizes whose product is "
                f"context_parallel_size {self.context_parallel_size}"
            )

    @property
    def num_ranks_sharing_heads(self) -> int:
        """Number of context-parallel ranks that share the heads in attention."""
        if self.cp_comm_type == "a2a+p2p":
            return self.hierarchical_context_parallel_sizes[0]
        return self.context_parallel_size if self.cp_comm_type == "a2a" else 1

    @property
    def fp8_multiple(self) -> int:
        """Number that must divide rows and columns of FP8 matrix products; 1 without FP8."""
        if self.fp8_format is None:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @property
    def token_multiple(self) -> int:
        """Number to whose multiple each rank's tokens are padded, and those of text and image."""
        if self.fp8_format is not None and self.fp8_recipe == "blockwise" and self.sequence_parallel:
            return 128  # Transformer Engine gathers whole FP8 blocks
        return self.fp8_multiple

    @property
    def num_chunks(self) -> int:
        """Number of model chunks of each pipeline rank."""
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
