"""How a job is spread over processes: Megatron-LM's names and meanings."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """tensor, sequence, context, pipeline and data parallelism"""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that share the layers."""
    context_parallel_size: int = 1
    """Ranks that share each sample's tokens in attention (Ulysses all-to-all)."""
    sequence_parallel: bool = False
    """Share the tokens over the tensor-parallel ranks outside the linear layers."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when stages are uneven; none shares all layers evenly."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when stages are uneven; none shares all layers evenly."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks per pipeline rank: smaller bubbles, more messages; none is one."""
    use_distributed_optimizer: bool = False
    """Share the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Start reducing gradients while the backward pass runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: of whole layers, or of recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recomputation of all layers, or (block) of the first recompute_num_layers of each stage."""
    recompute_num_layers: int = 1
    """With uniform: layers recomputed at once (with layer memory always one); with block: layers recomputed."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What selective recomputation recomputes, of core_attn and mlp."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Which linears, norms and attention: torch's (local) or Transformer Engine's."""
    layer_memory_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What mixes layer memory: Triton's kernels, plain torch, or Triton's on CUDA and torch elsewhere."""
    distributed_timeout_minutes: float = 10
    """When a rank does not move for so long, the run ends and names the ranks that the others wait for."""

    def __post_init__(self) -> None:
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
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
        if self.recompute_num_layers < 1:
            raise ValueError(f"recompute_num_layers must be at least 1, got {self.recompute_num_layers}")
        if unknown := set(self.recompute_modules) - {"core_attn", "mlp"}:
            raise ValueError(f"recompute_modules takes core_attn and mlp, got {' '.join(sorted(unknown))}")

    @property
    def num_chunks(self) -> int:
        """Model chunks that each pipeline rank holds."""
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
