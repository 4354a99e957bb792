"""A job is everything a run was asked to do. It is stored as JSON with every checkpoint."""

from dataclasses import dataclass, field

from megatron_fsvideo.config.data import DataConfig, VideoDataConfig
from megatron_fsvideo.config.dit import DiffusionConfig, DiTConfig
from megatron_fsvideo.config.fsae import FSAEConfig, FSAETrainingConfig
from megatron_fsvideo.config.parallel import ParallelConfig
from megatron_fsvideo.config.training import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class DiTJob:
    """Train the base DiT or the refiner on a latent dataset."""

    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_layout(self.model, self.parallel)


@dataclass(frozen=True)
class FSAEJob:
    """Train the video autoencoder on video files."""

    model: FSAEConfig = field(default_factory=FSAEConfig)
    losses: FSAETrainingConfig = field(default_factory=FSAETrainingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: VideoDataConfig = field(default_factory=VideoDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        factor = self.model.spatial_factor
        for name, side in (("resolution", self.data.resolution), ("valid_resolution", self.data.valid_side)):
            if side % factor:
                raise ValueError(
                    f"{name} {side} is not a multiple of the autoencoder's spatial factor {factor}; "
                    f"try {max(1, round(side / factor)) * factor}"
                )
        if self.losses.perceptual_weight > 0 and self.losses.perceptual_trunk == "none":
            raise ValueError(
                f"perceptual_weight is {self.losses.perceptual_weight}, but perceptual_trunk is none: name a trunk, or "
                "set the weight to 0"
            )


def check_layout(model: DiTConfig, parallel: ParallelConfig) -> None:
    """Refuse a parallel layout that the model's sizes do not allow (dit_spec 1.7's table).

    Raises:
        ValueError: naming both numbers.
    """
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    if model.num_attention_heads % tp:
        raise ValueError(
            f"tensor_model_parallel_size {tp} does not divide num_attention_heads {model.num_attention_heads}"
        )
    if model.ffn_hidden_size % tp:
        raise ValueError(f"tensor_model_parallel_size {tp} does not divide ffn_hidden_size {model.ffn_hidden_size}")
    if model.num_attention_heads % (tp * cp):
        raise ValueError(
            f"tensor_model_parallel_size {tp} x context_parallel_size {cp} = {tp * cp} does not divide "
            f"num_attention_heads {model.num_attention_heads}, which the Ulysses all-to-all needs"
        )
    uneven = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if uneven == (None, None) and model.num_layers % pp:
        raise ValueError(
            f"pipeline_model_parallel_size {pp} does not divide num_layers {model.num_layers}; "
            "set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    if model.num_layers < pp:
        raise ValueError(f"pipeline_model_parallel_size {pp} is larger than num_layers {model.num_layers}")
