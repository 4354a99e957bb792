"""The planner's description of one training job: model, sizes, layout. Nothing here depends on hardware."""

from dataclasses import dataclass

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig
from megatron_fsvideo.models.flops import Rows


@dataclass(frozen=True)
class Case:
    """A model in one layout, trained on samples of one size.

    Attributes:
        rows: latent, text and image rows of one sample.
        dp_size: data-parallel replicas.
        num_microbatches: forward and backward passes of a rank in one optimizer step.
        has_ema: whether an fp32 moving average of the weights is kept.
    """

    model: DiTConfig
    parallel: DiTParallelConfig
    rows: Rows
    micro_batch_size: int = 1
    num_microbatches: int = 1
    dp_size: int = 1
    bf16: bool = True
    has_ema: bool = True

    @property
    def element(self) -> int:
        """Bytes of one element of the layers' activations and weights."""
        return 2 if self.bf16 else 4

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.parallel.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.parallel.context_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.parallel.model_parallel_size * self.dp_size

    @property
    def global_batch_size(self) -> int:
        """Samples in an optimizer step."""
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    @property
    def inner_rows(self) -> float:
        """Tokens x samples of a rank in attention and linears: cut over context-parallel ranks only."""
        return self.micro_batch_size * self.rows.tokens / self.cp

    @property
    def outer_rows(self) -> float:
        """Tokens x samples of a rank between attention and linears; sequence parallelism cuts them over TP too."""
        return self.inner_rows / (self.tp if self.parallel.sequence_parallel else 1)

    @property
    def context_rows(self) -> int:
        """Context rows x samples: whole on every rank."""
        return self.micro_batch_size * self.rows.context(self.model)

    def chunks(self, stage: int) -> list[range]:
        """The layers (from 1) of each model chunk of a pipeline stage, as Megatron deals them out."""
        sizes = self._stage_sizes()
        virtual = self.parallel.num_chunks
        chunks, first = [], 1
        for _ in range(virtual):
            for index, size in enumerate(sizes):
                if index == stage:
                    chunks.append(range(first, first + size // virtual))
                first += size // virtual
        return chunks

    def _stage_sizes(self) -> list[int]:
        first = self.parallel.num_layers_in_first_pipeline_stage
        last = self.parallel.num_layers_in_last_pipeline_stage
        given = [number for number in (first, last) if number is not None]
        others = self.pp - len(given)
        even = (self.model.num_layers - sum(given)) // others if others else 0
        sizes = [even] * self.pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        return sizes
