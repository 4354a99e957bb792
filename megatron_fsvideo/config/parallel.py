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
    use_distributed_optimizer: bool = False
    """Share the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Start reducing gradients while the backward pass runs."""
    recompute_granularity: Literal["full"] | None = None
    """Recompute whole layers in the backward pass instead of keeping their activations."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Which linears, norms and attention: torch's (local) or Transformer Engine's."""
    layer_memory_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What mixes layer memory: Triton's kernels, plain torch, or Triton's on CUDA and torch elsewhere."""
    distributed_timeout_minutes: int = 10
    """A collective that takes longer ends the run."""

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

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
