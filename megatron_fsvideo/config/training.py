"""How long, how fast and with what record a job trains; shared by every entry script."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """batches, iterations, precision, validation"""

    micro_batch_size: int = 1
    """Samples per data-parallel rank in one forward pass."""
    global_batch_size: int = 1
    """Samples per optimizer step over all ranks, of the largest bucket; smaller ones get more."""
    batch_size_multiple: int = 0
    """Batches of all buckets are multiples of this many samples, whatever the layout is; 0 takes global_batch_size. A
    small number keeps to the token budget more closely, a large one lets more layouts share the batches."""
    train_iters: int = 100
    """Optimizer steps of the whole run."""
    seed: int = 1234
    """Seed of initial weights, data order, noise and sigmas."""
    bf16: bool = False
    """Train in bfloat16 with fp32 master weights."""
    eval_interval: int = 0
    """Iterations between validations; 0 validates only at the start and the end."""
    eval_iters: int = 0
    """Validation batches (of the global batch size) each time; 0 validates never."""
    exit_interval: int = 0
    """Save and leave after this many iterations of this process; 0 runs to train_iters."""
    exit_duration_in_mins: float | None = None
    """Save and leave at the first iteration's end after so many minutes of this process; none sets no limit."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 to any rank, save at the iteration's end and leave; off, the signals kill."""
    max_consecutive_skipped: int = 10
    """Stop after this many iterations in a row whose loss or gradient was not finite (their step is skipped)."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.batch_size_multiple < 0:
            raise ValueError(f"batch_size_multiple {self.batch_size_multiple} cannot be negative")
        if self.max_consecutive_skipped < 1:
            raise ValueError(f"max_consecutive_skipped must be at least 1, got {self.max_consecutive_skipped}")


@dataclass(frozen=True)
class OptimizerConfig:
    """optimizer, learning-rate schedule, moving average"""

    optimizer: Literal["adam", "muon"] = "adam"
    """AdamW on everything, or Muon on matrices and AdamW on the rest."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices (with optimizer muon)."""
    muon_precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of Muon's orthogonalisation."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, as a value of lr."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay."""
    lr_decay_start: float = 0.0
    """Share of train_iters after which the decay begins."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases, norms, modulation and router."""
    adam_beta1: float = 0.9
    """AdamW's first beta (paper: 0.9)."""
    adam_beta2: float = 0.95
    """AdamW's second beta (paper: 0.95)."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    router_lr_mult: float = 10.0
    """The layer-memory router's learning rate as a multiple of lr (LIMe uses 10)."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0.0 <= self.lr_decay_start < 1.0:
            raise ValueError(f"lr_decay_start is a share of train_iters in [0, 1), got {self.lr_decay_start}")


@dataclass(frozen=True)
class CheckpointConfig:
    """where the run's state is kept"""

    save: str | None = None
    """Folder for checkpoints; none saves nothing."""
    load: str | None = None
    """Folder to continue from. It may be the --save folder, and may still be empty."""
    save_interval: int = 0
    """Iterations between checkpoints; 0 saves only at the end."""
    async_save: bool = False
    """Copy the state to host memory and write it while training goes on."""
    keep_checkpoints: int = 0
    """Newest checkpoints that are kept; 0 keeps all."""
    finetune: bool = False
    """Load only the weights: optimizer, iteration and data position start anew."""
    init_from: str | None = None
    """Where a run without a checkpoint takes its weights from: a --save folder of an earlier run, or a release folder.
    (autoencoder)"""


@dataclass(frozen=True)
class StageConfig:
    """training in stages, each with data and a schedule of its own"""

    new_stage: bool = False
    """Begin a stage with the state in --load: weights, their average, optimizer and iteration go on, the data and the
    schedule are this run's (train_iters counts the stages before). Ignored once --save holds a checkpoint."""


@dataclass(frozen=True)
class SamplingConfig:
    """videos of validation samples, generated now and then while training goes on"""

    sample_interval: int = 0
    """Iterations between samplings; 0 samples never. They go to tensorboard_dir/videos and to TensorBoard."""
    num_validation_videos: int = 8
    """Validation samples whose first frame and text are used, always the same ones with the same noise."""
    num_sampling_steps: int = 30
    """Euler steps of each."""
    sampling_guidance_scale: float = 1.0
    """Guidance away from the dataset's negative prompt; 1 is one model call a step, without guidance."""
    fsae: str | None = None
    """The autoencoder that decodes them (a release or --save folder); none writes latents alone."""

    def __post_init__(self) -> None:
        if self.sample_interval and min(self.num_validation_videos, self.num_sampling_steps) < 1:
            raise ValueError(
                f"num_validation_videos {self.num_validation_videos} and num_sampling_steps {self.num_sampling_steps} "
                "must be at least 1"
            )


@dataclass(frozen=True)
class LoggingConfig:
    """what the run writes down"""

    log_interval: int = 10
    """Iterations between log lines."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events and metrics.jsonl; none writes neither."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, of which MFU is a share; none looks the device's name up (a CPU has no MFU)."""
    router_image_interval: int = 0
    """DiT: iterations between TensorBoard pictures of where layer memory looks (paper Figure 6); 0 draws none."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be positive, got {self.peak_tflops}")
        if self.router_image_interval < 0:
            raise ValueError(f"router_image_interval must not be negative, got {self.router_image_interval}")
        if self.router_image_interval and self.tensorboard_dir is None:
            raise ValueError(
                f"router_image_interval {self.router_image_interval} draws into TensorBoard: name a tensorboard_dir"
            )


@dataclass(frozen=True)
class ProfilingConfig:
    """a look at where time and memory go, for a few iterations"""

    profile: bool = False
    """Record iterations profile_step_start + 1 to profile_step_end with torch's profiler (see docs/debugging.md)."""
    profile_step_start: int = 10
    """Iterations before the first recorded one; the first few of a process are slow."""
    profile_step_end: int = 12
    """Last recorded iteration."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that record."""
    record_memory_history: bool = False
    """Record the CUDA allocator in the same iterations, for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        if not 0 <= self.profile_step_start < self.profile_step_end:
            raise ValueError(
                f"profile_step_start {self.profile_step_start} must be less than profile_step_end "
                f"{self.profile_step_end}, and not negative"
            )
