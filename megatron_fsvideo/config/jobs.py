"""A job is everything a run was asked to do. It is stored as JSON with every checkpoint."""

from dataclasses import dataclass, field, replace

from megatron_fsvideo.config.data import DataConfig, VideoDataConfig
from megatron_fsvideo.config.dit import DiffusionConfig, DiTConfig
from megatron_fsvideo.config.fsae import FSAEConfig, FSAEMemoryConfig, FSAEPhaseConfig
from megatron_fsvideo.config.fsae_losses import (
    AdversaryConfig,
    AlignmentConfig,
    PerceptualLossConfig,
    ReconstructionLossConfig,
)
from megatron_fsvideo.config.parallel import DiTParallelConfig, ParallelConfig
from megatron_fsvideo.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ProfilingConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class DiTJob:
    """Train the base DiT or the refiner on a latent dataset."""

    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def __post_init__(self) -> None:
        # Here and in checkpoints only the number of stages is used: layers per stage mean nothing without the model.
        object.__setattr__(self, "parallel", count_virtual_stages(self.model, self.parallel))
        check_layout(self.model, self.parallel)
        check_stage(self.stage, self.checkpoint)
        self._check_sampling()
        if self.parallel.fp8_format is not None and not self.training.bf16:
            raise ValueError(f"fp8_format {self.parallel.fp8_format} needs bf16: what is not in FP8 is in bfloat16")
        if self.logging.router_image_interval and not (self.model.layer_memory and self.model.num_layers > 1):
            raise ValueError(
                f"router_image_interval {self.logging.router_image_interval} draws layer memory's routers, and a model "
                f"of {self.model.num_layers} layers with layer_memory {self.model.layer_memory} has none: set it to 0"
            )

    def _check_sampling(self) -> None:
        if not self.sampling.sample_interval:
            return
        if not self.data.valid_data_path or self.training.eval_iters == 0 or self.logging.tensorboard_dir is None:
            raise ValueError("sample_interval needs valid_data_path, eval_iters and tensorboard_dir")
        if self.parallel.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"sample_interval: sampling runs whole models, not pipeline_model_parallel_size "
                f"{self.parallel.pipeline_model_parallel_size}; generate from the checkpoints with tools/generate.py"
            )


@dataclass(frozen=True)
class FSAEJob:
    """Train the video autoencoder on video files."""

    model: FSAEConfig = field(default_factory=FSAEConfig)
    phase: FSAEPhaseConfig = field(default_factory=FSAEPhaseConfig)
    losses: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    perceptual: PerceptualLossConfig = field(default_factory=PerceptualLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    memory: FSAEMemoryConfig = field(default_factory=FSAEMemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: VideoDataConfig = field(default_factory=VideoDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def __post_init__(self) -> None:
        if self.logging.router_image_interval:
            raise ValueError("router_image_interval is for the DiT: an autoencoder has no layer memory")
        self._check_sizes()
        self._check_losses()
        self._check_memory()

    def _check_sizes(self) -> None:
        factor = self.model.spatial_factor
        for name, side in (("resolution", self.data.resolution), ("valid_resolution", self.data.valid_side)):
            if side % factor:
                raise ValueError(
                    f"{name} {side} is not a multiple of the autoencoder's spatial factor {factor}; "
                    f"try {max(1, round(side / factor)) * factor}"
                )

    def _check_losses(self) -> None:
        phase = self.phase.phase
        if self.losses.perceptual_weight > 0 and self.perceptual.perceptual_trunk == "none":
            raise ValueError(
                f"perceptual_weight is {self.losses.perceptual_weight}, but perceptual_trunk is none: name a trunk, or "
                "set the weight to 0"
            )
        decoder = {5: "standard", 6: "lite"}.get(phase, "causal")
        if self.model.decoder != decoder:
            raise ValueError(
                f"phase {phase} trains a {decoder} decoder, but decoder is {self.model.decoder}: change one of the two"
            )
        if self.losses.latent_noise > 0 and not self.phase.trains_encoder:
            raise ValueError(f"latent_noise {self.losses.latent_noise} is for phases 1 to 4: set it to 0")
        if self.alignment.latent_regularizer != "none" and not self.phase.trains_encoder:
            raise ValueError(
                f"latent_regularizer {self.alignment.latent_regularizer} shapes the latents, which phase {phase} "
                "leaves as they are: set it to none"
            )

    def _check_memory(self) -> None:
        if self.parallel.recompute_granularity == "selective":
            raise ValueError("recompute_granularity selective is for the DiT: the autoencoder has full, or none")
        if self.parallel.context_parallel_size > 1 and (self.memory.encoder_slice or self.memory.patch_latents):
            raise ValueError(
                f"encoder_slice {self.memory.encoder_slice} and patch_latents {self.memory.patch_latents} cut time, "
                f"which context_parallel_size {self.parallel.context_parallel_size} has cut already: set them to 0, "
                "and use encoder_tile, patch_rows and patch_columns"
            )

    @property
    def uses_gan(self) -> bool:
        """Whether this run trains with a discriminator."""
        return self.phase.has_adversary and self.adversary.gan_weight > 0

    @property
    def uses_vf(self) -> bool:
        """Whether this run aligns the latents with a vision model."""
        return self.phase.has_alignment and self.alignment.vf_weight > 0


def check_stage(stage: StageConfig, checkpoint: CheckpointConfig) -> None:
    """Refuse --new-stage together with --finetune.

    Raises:
        ValueError: both flags are given.
    """
    if stage.new_stage and checkpoint.finetune:
        raise ValueError(
            "new_stage keeps optimizer and iteration, finetune starts them anew: give one of them (or --no-new-stage)"
        )


def count_virtual_stages(model: DiTConfig, parallel: DiTParallelConfig) -> DiTParallelConfig:
    """`num_layers_per_virtual_pipeline_stage`, if given, as the `num_virtual_stages_per_pipeline_rank` that it means.

    Raises:
        ValueError: the layers do not come out even.
    """
    layers, pp = parallel.num_layers_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    if layers is None:
        return parallel
    if model.num_layers % (pp * layers):
        raise ValueError(
            f"num_layers_per_virtual_pipeline_stage {layers} x pipeline_model_parallel_size {pp} = {pp * layers} does "
            f"not divide num_layers {model.num_layers}"
        )
    chunks = model.num_layers // (pp * layers)
    return replace(
        parallel,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=chunks if chunks > 1 else None,
    )


def check_layout(model: DiTConfig, parallel: DiTParallelConfig) -> None:
    """Refuse a parallel layout that the model's sizes do not allow.

    Raises:
        ValueError: two sizes do not fit; the message has both.
    """
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        raise ValueError(
            f"num_layers_per_virtual_pipeline_stage {parallel.num_layers_per_virtual_pipeline_stage}: this job runs "
            "one model chunk per rank; leave the flag out"
        )
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if model.num_attention_heads % tp:
        raise ValueError(
            f"tensor_model_parallel_size {tp} does not divide num_attention_heads {model.num_attention_heads}"
        )
    if model.ffn_hidden_size % tp:
        raise ValueError(f"tensor_model_parallel_size {tp} does not divide ffn_hidden_size {model.ffn_hidden_size}")
    sharing = parallel.num_ranks_sharing_heads
    if model.num_attention_heads % (tp * sharing):
        name = "context_parallel_size" if sharing == cp else "hierarchical_context_parallel_sizes' first,"
        raise ValueError(
            f"tensor_model_parallel_size {tp} x {name} {sharing} = {tp * sharing} does not divide "
            f"num_attention_heads {model.num_attention_heads}, which the Ulysses all-to-all needs"
        )
    _check_fp8_widths(model, parallel)
    _check_stages(model.num_layers, parallel)
    _check_virtual_stages(model.num_layers, parallel)


def check_token_count(num_tokens: int, source: str, parallel: DiTParallelConfig) -> None:
    """Refuse samples whose tokens the ranks cannot share evenly; `source` names what has so many.

    Raises:
        ValueError: the tokens cannot be shared; the message has the numbers.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    num_ranks = cp * (tp if parallel.sequence_parallel else 1)
    if parallel.transformer_impl == "transformer_engine" and cp > 1 and num_tokens % (2 * cp):
        raise ValueError(
            f"{source}: Transformer Engine wants an even number of tokens on each of context_parallel_size {cp} ranks, "
            f"and there are {num_tokens} on all; choose another size of video or fewer ranks"
        )
    if num_tokens % num_ranks:
        with_tp = f" x tensor_model_parallel_size {tp} (sequence_parallel)" if parallel.sequence_parallel else ""
        raise ValueError(
            f"{source}: its {num_tokens} tokens cannot be shared evenly by context_parallel_size {cp}{with_tp} = "
            f"{num_ranks} ranks; choose another size of video or fewer ranks"
        )


def _check_fp8_widths(model: DiTConfig, parallel: DiTParallelConfig) -> None:
    tp = parallel.tensor_model_parallel_size
    widths = {
        "hidden_size": (model.hidden_size, parallel.token_multiple),
        f"hidden_size / tensor_model_parallel_size {tp}": (model.hidden_size // tp, parallel.fp8_multiple),
        f"ffn_hidden_size / tensor_model_parallel_size {tp}": (model.ffn_hidden_size // tp, parallel.fp8_multiple),
    }
    for name, (width, multiple) in widths.items():
        if width % multiple:
            raise ValueError(f"fp8_recipe {parallel.fp8_recipe} needs a multiple of {multiple}; {name} is {width}")


def _check_stages(num_layers: int, parallel: DiTParallelConfig) -> None:
    ends = [
        number
        for number in (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
        if number is not None
    ]
    pp = parallel.pipeline_model_parallel_size
    layers, stages = num_layers - sum(ends), pp - len(ends)
    if layers >= stages >= 0 and (layers % stages == 0 if stages else layers == 0):
        return
    if not ends:
        raise ValueError(
            f"pipeline_model_parallel_size {pp} does not divide num_layers {num_layers}; "
            "set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    raise ValueError(
        f"the first and last pipeline stage take {sum(ends)} of num_layers {num_layers}; the other {layers} cannot be "
        f"shared evenly by the other {stages} of {pp} stages"
    )


def _check_virtual_stages(num_layers: int, parallel: DiTParallelConfig) -> None:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    ends = [number for number in (first, last) if number is not None]
    others = parallel.pipeline_model_parallel_size - len(ends)
    if parallel.num_chunks > 1 and others == 0:
        raise ValueError(
            "virtual stages on two uneven pipeline stages: give num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage, not both"
        )
    sizes = [*ends, (num_layers - sum(ends)) // others] if others else ends
    for size in sizes:
        if size % parallel.num_chunks:
            raise ValueError(
                f"num_virtual_stages_per_pipeline_rank {parallel.num_chunks} does not divide the {size} layers of a "
                "pipeline stage"
            )
