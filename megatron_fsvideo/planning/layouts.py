"""All layouts of a job on a number of GPUs: refused with a reason, too large, or ranked by estimated speed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from megatron_fsvideo.config import Compression, DiTConfig, DiTParallelConfig, check_layout, check_token_count
from megatron_fsvideo.config.rules import Checked, NonNegative, Positive, PositiveInt
from megatron_fsvideo.config.training import Decay
from megatron_fsvideo.models.flops import Rows
from megatron_fsvideo.planning.case import Case
from megatron_fsvideo.planning.memory import MemoryByPart, peak_memory
from megatron_fsvideo.planning.rates import RateConfig
from megatron_fsvideo.planning.timing import speed

FP8_MULTIPLE = 16


@dataclass(frozen=True)
class PlanConfig(Checked):
    """the job, and the parts of its layout that are given; the planner searches the rest"""

    num_gpus: PositiveInt = 64
    """Number of GPUs of the job."""
    gpu_memory_gb: Positive = 80.0
    """Memory of one GPU in GB (10^9 bytes)."""
    reserved_memory_gb: NonNegative = 6.0
    """Part of the GPU memory for the CUDA context, NCCL and fragmentation, in GB."""
    frames: PositiveInt = 121
    """Frames of a clip: 1 + a multiple of temporal_factor. 1 is an image."""
    height: PositiveInt = 512
    """Height of a frame in pixels, a multiple of spatial_factor."""
    width: PositiveInt = 512
    """Width of a frame in pixels, a multiple of spatial_factor."""
    spatial_factor: PositiveInt = 64
    """Pixels per latent row and column."""
    temporal_factor: PositiveInt = 4
    """Frames per latent frame, after the first."""
    text_length: PositiveInt = 512
    """Number of text tokens."""
    image_length: PositiveInt = 257
    """Number of image tokens."""
    micro_batch_size: PositiveInt | None = None
    """Samples per rank in one forward pass. None tries 1, 2, 4 and 8."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step. None takes two per GPU."""
    tensor_model_parallel_size: PositiveInt | None = None
    """Number of ranks that share the weights of each layer. None searches."""
    sequence_parallel: bool | None = None
    """Divide the tokens among the tensor-parallel ranks. None does so if there are several ranks; without it, each rank
    mixes layer memory for all tokens."""
    context_parallel_size: PositiveInt | None = None
    """Number of ranks that share the tokens of each sample. None searches."""
    pipeline_model_parallel_size: PositiveInt | None = None
    """Number of pipeline stages. None searches."""
    num_virtual_stages_per_pipeline_rank: PositiveInt | None = None
    """Model chunks per pipeline rank. None is one chunk."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first pipeline stage. None gives it as many as the others."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Layers of the last pipeline stage. None gives it as many as the others."""
    recompute_granularity: Literal["search", "none", "selective", "full"] = "search"
    """Recomputation of activations. selective recomputes core_attn and mlp."""
    use_distributed_optimizer: bool = True
    """Divide the optimizer's state among the data- and context-parallel ranks."""
    overlap_grad_reduce: bool = True
    """Start to reduce gradients while the backward pass still runs."""
    bf16: bool = True
    """Train in bfloat16 with fp32 master weights."""
    fp8: bool = False
    """Check the sizes that FP8 needs. Set its rate with --gemm-tflops. Memory is counted as in bf16."""
    ema_decay: Decay = 0.9999
    """Decay of the moving average of the weights. 0 keeps no average."""
    top: PositiveInt = 5
    """Number of layouts to show."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.frames - 1) % self.temporal_factor:
            raise ValueError(f"frames {self.frames} is not 1 + a multiple of temporal_factor {self.temporal_factor}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side % self.spatial_factor:
                below = side // self.spatial_factor * self.spatial_factor
                raise ValueError(
                    f"{name} {side} is not a multiple of spatial_factor {self.spatial_factor}; the nearest are "
                    f"{below} and {below + self.spatial_factor}"
                )

    @property
    def batch(self) -> int:
        """Number of samples in an optimizer step."""
        return self.global_batch_size or 2 * self.num_gpus

    def rows(self, model: DiTConfig) -> Rows:
        """Numbers of latent, text and image rows of one sample.

        Raises:
            ValueError: the patch does not divide the latents.
        """
        compression = Compression(self.spatial_factor, self.temporal_factor)
        sides = compression.latent_shape(self.frames, self.height, self.width)
        tokens = 1
        for side, patch in zip(sides, model.patch_size, strict=True):
            if side % patch:
                raise ValueError(f"a latent of {sides} is not a multiple of patch_size {model.patch_size}")
            tokens *= side // patch
        return Rows(tokens, self.text_length, self.image_length)


@dataclass(frozen=True)
class Plan:
    """One legal layout with its memory and time.

    Attributes:
        stage: pipeline stage that needs most memory.
        memory: that stage's bytes by part.
    """

    case: Case
    stage: int
    memory: MemoryByPart
    step_seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def memory_bytes(self) -> float:
        """Peak memory of a rank of that stage."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Search:
    """Result of the search over all layouts.

    Attributes:
        fitting: plans that fit into memory, fastest first.
        too_large: plans that need too much memory, smallest first.
        refused: reason -> how many layouts it ruled out.
    """

    fitting: list[Plan]
    too_large: list[Plan]
    refused: dict[str, int]


def search(model: DiTConfig, plan: PlanConfig, rates: RateConfig) -> Search:
    """Try every layout that the given values leave open."""
    rows = plan.rows(model)
    limit = (plan.gpu_memory_gb - plan.reserved_memory_gb) * 1e9
    plans: list[Plan] = []
    refused: dict[str, int] = {}
    for tp, cp, pp in _sizes(plan):
        reason = refuse_sizes(model, plan, rates, tp, cp, pp)
        if reason is not None:
            refused[reason] = refused.get(reason, 0) + 1
            continue
        for parallel, micro in product(_parallels(model, plan, tp, cp, pp), _micro_batches(plan)):
            case, reason = make_case(model, plan, parallel, rows, micro)
            if case is None:
                refused[reason] = refused.get(reason, 0) + 1
                continue
            stage, memory = peak_memory(case)
            plans.append(Plan(case, stage, memory, **speed(case, rates)))
    fitting = sorted((p for p in plans if p.memory_bytes <= limit), key=lambda p: -p.tokens_per_second)
    too_large = sorted((p for p in plans if p.memory_bytes > limit), key=lambda p: p.memory_bytes)
    return Search(fitting, too_large, refused)


def refuse_sizes(model: DiTConfig, plan: PlanConfig, rates: RateConfig, tp: int, cp: int, pp: int) -> str | None:
    """Why these sizes form no valid layout, whatever else is chosen; None if they can form one."""
    if plan.num_gpus % (tp * cp * pp):
        return f"TP {tp} x CP {cp} x PP {pp} = {tp * cp * pp} does not divide num_gpus {plan.num_gpus}"
    if tp > rates.gpus_per_node:
        return f"TP {tp} would gather every layer's tokens between nodes of {rates.gpus_per_node} GPUs"
    if pp > model.num_layers:
        return f"PP {pp} has more stages than num_layers {model.num_layers}"
    try:
        parallel = _parallel(model, plan, tp, cp, pp, "none")
        check_layout(model, parallel)
        check_token_count(plan.rows(model).tokens, f"clips of {plan.frames}x{plan.height}x{plan.width}", parallel)
    except ValueError as error:
        return str(error)
    return None


def make_case(
    model: DiTConfig, plan: PlanConfig, parallel: DiTParallelConfig, rows: Rows, micro: int
) -> tuple[Case | None, str]:
    """The case of a layout and a micro-batch size, or the reason why the layout is refused."""
    dp = plan.num_gpus // parallel.model_parallel_size
    if plan.batch % (micro * dp):
        return None, f"global_batch_size {plan.batch} is not a multiple of micro_batch_size {micro} x DP {dp}"
    microbatches = plan.batch // (micro * dp)
    chunks, pp = parallel.num_chunks, parallel.pipeline_model_parallel_size
    if chunks > 1 and microbatches % pp:
        return None, f"{microbatches} micro-batches are not a multiple of PP {pp}, which virtual stages need"
    case = Case(model, parallel, rows, micro, microbatches, dp, plan.bf16, plan.ema_decay > 0)
    if plan.fp8 and (reason := refuse_fp8(case)) is not None:
        return None, reason
    return case, ""


def refuse_fp8(case: Case) -> str | None:
    """Why FP8 refuses the sizes: widths must be multiples of 16. Rows are padded (models/dit/model.py)."""
    tp = case.tp
    sides = {
        f"hidden_size {case.model.hidden_size} / TP {tp}": case.model.hidden_size / tp,
        f"ffn_hidden_size {case.model.ffn_hidden_size} / TP {tp}": case.model.ffn_hidden_size / tp,
    }
    for name, side in sides.items():
        if side % FP8_MULTIPLE:
            return f"FP8: {name} = {side:g} is not a multiple of {FP8_MULTIPLE}"
    return None


def _sizes(plan: PlanConfig) -> Iterator[tuple[int, int, int]]:
    """All (TP, CP, PP) with the given values, and divisors of the number of GPUs for the values not given."""
    divisors = [number for number in range(1, plan.num_gpus + 1) if plan.num_gpus % number == 0]
    given = (plan.tensor_model_parallel_size, plan.context_parallel_size, plan.pipeline_model_parallel_size)
    for sizes in product(*([size] if size is not None else divisors for size in given)):
        tp, cp, pp = sizes
        if tp * cp * pp <= plan.num_gpus or all(size is not None for size in given):
            yield tp, cp, pp


def _micro_batches(plan: PlanConfig) -> list[int]:
    return [plan.micro_batch_size] if plan.micro_batch_size is not None else [1, 2, 4, 8]


def _sequence_parallel(plan: PlanConfig, tp: int) -> bool:
    return tp > 1 if plan.sequence_parallel is None else plan.sequence_parallel


def _parallels(model: DiTConfig, plan: PlanConfig, tp: int, cp: int, pp: int) -> list[DiTParallelConfig]:
    wanted = plan.recompute_granularity
    kinds = ["none", "selective", "full"] if wanted == "search" else [wanted]
    return [_parallel(model, plan, tp, cp, pp, kind) for kind in kinds]


def _parallel(model: DiTConfig, plan: PlanConfig, tp: int, cp: int, pp: int, recompute: str) -> DiTParallelConfig:
    first, last = plan.num_layers_in_first_pipeline_stage, plan.num_layers_in_last_pipeline_stage
    if first is None and last is None and pp > 1 and model.num_layers % pp:
        first, last = _uneven_ends(model.num_layers, pp)
    return DiTParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=_sequence_parallel(plan, tp),
        num_virtual_stages_per_pipeline_rank=plan.num_virtual_stages_per_pipeline_rank if pp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_modules=("core_attn", "mlp"),
        use_distributed_optimizer=plan.use_distributed_optimizer,
        overlap_grad_reduce=plan.overlap_grad_reduce,
    )


def _uneven_ends(num_layers: int, pp: int) -> tuple[int | None, int | None]:
    """Numbers of layers of the first and the last stage if each other stage has num_layers / pp, rounded up."""
    if pp == 2:
        return num_layers // 2, num_layers - num_layers // 2
    middle = -(-num_layers // pp)
    ends = num_layers - middle * (pp - 2)
    return (ends // 2, ends - ends // 2) if ends >= 2 else (None, None)
