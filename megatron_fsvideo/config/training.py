"""Flags of training that every entry script has: length, optimizer, checkpoints, stages and logs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config.rules import Checked, Count, NonNegative, PathText, Positive, PositiveInt

Decay = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """batches, iterations, precision, validation"""

    micro_batch_size: PositiveInt = 1
    """Samples per data-parallel rank in one forward pass."""
    global_batch_size: PositiveInt = 1
    """Samples per optimizer step over all ranks, for the largest bucket. Smaller buckets get larger batches."""
    batch_size_multiple: Count = 0
    """Batches of all buckets are multiples of this number of samples, in every layout. A small number follows the token
    budget more closely; a large one allows more layouts. 0 takes global_batch_size."""
    train_iters: PositiveInt = 100
    """Optimizer steps of the whole run."""
    seed: Count = 1234
    """Seed of initial weights, data order, noise and noise levels."""
    bf16: bool = False
    """Train in bfloat16 with fp32 master weights."""
    eval_interval: Count = 0
    """Iterations between validations. 0 validates only at the start and at the end."""
    eval_iters: Count = 0
    """Batches per validation, each of the global batch size. 0 switches validation off."""
    exit_interval: Count = 0
    """Save a checkpoint and exit after this process has run this many iterations. 0 runs to train_iters."""
    exit_duration_in_mins: Positive | None = None
    """Save a checkpoint and exit once this process has run this many minutes (checked after each iteration). None sets
    no limit."""
    exit_signal_handler: bool = True
    """On SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any rank, save a checkpoint at the end of the iteration and exit. If
    off, these signals kill the process."""
    max_consecutive_skipped: PositiveInt = 10
    """Stop the run after this many skipped iterations in a row. An iteration is skipped if its loss or gradient is not
    finite."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """optimizer, learning-rate schedule, moving average"""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam uses AdamW for all parameters; muon uses Muon for matrices and AdamW for the rest."""
    lr: NonNegative = 1e-4
    """Peak learning rate of AdamW."""
    muon_lr: NonNegative = 0.02
    """Peak learning rate of Muon (only with --optimizer muon)."""
    muon_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of Muon's orthogonalisation."""
    min_lr: NonNegative = 0.0
    """Learning rate of AdamW at the end of the decay. Muon's rate decays by the same factor."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate's decay."""
    lr_decay_start: Decay = 0.0
    """Share of train_iters after which the decay begins."""
    lr_warmup_iters: Count = 0
    """Iterations of linear warm-up."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay. Biases, norms, modulation and the layer-memory router have none."""
    adam_beta1: Decay = 0.9
    """First beta of AdamW (paper: 0.9)."""
    adam_beta2: Decay = 0.95
    """Second beta of AdamW (paper: 0.95)."""
    adam_eps: Positive = 1e-8
    """Epsilon of AdamW."""
    clip_grad: NonNegative = 1.0
    """Largest norm of all gradients together; larger gradients are scaled down to it. 0 switches clipping off."""
    router_lr_mult: NonNegative = 1.0
    """Learning rate of the layer-memory router as a multiple of lr."""
    ema_decay: Decay = 0.9999
    """Decay of the moving average of the weights. 0 keeps no average."""


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """where the run's state is kept"""

    save: PathText | None = None
    """Folder for checkpoints. None saves nothing."""
    load: PathText | None = None
    """Folder to continue from. It may be the --save folder, which may still be empty."""
    save_interval: Count = 0
    """Iterations between checkpoints. 0 saves only at the end."""
    async_save: bool = False
    """Copy the state to host memory and write it to disk while training continues."""
    keep_checkpoints: Count = 0
    """Number of checkpoints to keep, newest first. 0 keeps all."""
    finetune: bool = False
    """Load only the weights. Optimizer, iteration and data position start anew."""
    init_from: PathText | None = None
    """Folder from which a run without a checkpoint takes its weights: a --save folder of an earlier run, or a release
    (autoencoder only)."""


@dataclass(frozen=True)
class StageConfig(Checked):
    """training in stages, each with its own data and schedule"""

    new_stage: bool = False
    """Begin a new stage from the checkpoint in --load. Weights, moving average, optimizer state and iteration continue;
    data and schedule are those of this run (train_iters includes earlier stages). Ignored once --save holds a
    checkpoint."""
    latent_scale: Literal["checkpoint", "data"] = "checkpoint"
    """DiT: mean and standard deviation that normalise the latents, where a run begins with loaded weights. checkpoint
    keeps those that the weights were trained with; data takes those of this run's dataset, to which the weights must
    adapt."""


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """videos of validation samples, generated during training"""

    sample_interval: Count = 0
    """Iterations between generations. 0 generates no videos. The videos go to tensorboard_dir/videos and
    TensorBoard."""
    num_validation_videos: PositiveInt = 8
    """Number of validation samples whose first frame and text are used: always the same samples and the same noise."""
    num_sampling_steps: PositiveInt = 30
    """Euler steps per video."""
    sampling_guidance_scale: float = 1.0
    """Scale of the guidance away from the dataset's negative prompt. 1 is without guidance: one model call per step."""
    fsae: PathText | None = None
    """Autoencoder that decodes the latents: a release folder or a --save folder. None writes the latents only."""


@dataclass(frozen=True)
class LoggingConfig(Checked):
    """what the run writes down"""

    log_interval: PositiveInt = 10
    """Iterations between log lines."""
    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard events and metrics.jsonl. None writes neither."""
    peak_tflops: Positive | None = None
    """Peak rate of one device in TFLOP/s, for the model FLOPs utilisation (MFU). None looks it up by the device's name;
    no MFU is logged for a CPU or an unknown device."""
    router_image_interval: Count = 0
    """Iterations between TensorBoard pictures of the layer-memory router's weights (paper Figure 6; DiT only). 0 draws
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_image_interval and self.tensorboard_dir is None:
            raise ValueError(
                f"router_image_interval {self.router_image_interval} draws into TensorBoard: name a tensorboard_dir"
            )


@dataclass(frozen=True)
class ProfilingConfig(Checked):
    """time and memory of a few iterations"""

    profile: bool = False
    """Record iterations profile_step_start + 1 to profile_step_end with torch's profiler (docs/debugging.md)."""
    profile_step_start: Count = 10
    """Iterations before the first recorded one. The first few iterations of a process are slow."""
    profile_step_end: PositiveInt = 12
    """Last recorded iteration."""
    profile_ranks: tuple[Count, ...] = (0,)
    """Ranks that record."""
    record_memory_history: bool = False
    """Record the CUDA allocator in the same iterations, for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile_step_start >= self.profile_step_end:
            raise ValueError(
                f"profile_step_start {self.profile_step_start} must be less than profile_step_end "
                f"{self.profile_step_end}"
            )
