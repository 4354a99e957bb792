"""Time training steps of the DiT, with and without layer memory, beside diffusers' Wan with torch's AdamW.

    python tools/benchmark_dit_training.py --preset dit_debug --latent-grid 2 4 4 --rounds 1 --json runs/training.json

    python tools/benchmark_dit_training.py --bf16 --hidden-size 512 --num-layers 8 --num-attention-heads 8 \
        --ffn-hidden-size 1536 --latent-grid 31 4 4 --micro-batch-size 2 --global-batch-size 2 --json runs/training.json

One device. Each contender runs in a process of its own; they take turns, several iterations each time, so that a
machine that slows down slows down all. All have equal sizes, batches and loss, fp32 master weights with --bf16,
gradient clipping, and no moving average. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_fsvideo.benchmarking.contenders import Contender, answer, ratio
from megatron_fsvideo.config import (
    DIT_PRESETS,
    DiffusionConfig,
    DiTConfig,
    DiTParallelConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
    parse_job,
    presets_for,
    require,
    run_script,
)
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json
from megatron_fsvideo.models.flops import Rows, hardware_flops, peak_tflops, total, training_flops

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ContenderName = Literal["ours", "ours_without_memory", "diffusers"]
CONTENDERS = OURS, WITHOUT_MEMORY, DIFFUSERS = get_args(ContenderName)

# Modules that diffusers keeps in fp32 when it loads a model in bf16.
DIFFUSERS_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")

Step = Callable[[], None]


@dataclass(frozen=True)
class BenchmarkFlags(Checked):
    """what is measured"""

    contenders: tuple[ContenderName, ...] = CONTENDERS
    """Implementations to compare."""
    latent_grid: tuple[PositiveInt, PositiveInt, PositiveInt] = (31, 8, 8)
    """Latent frames, rows and columns: 31 8 8 is 121 frames of 512x512."""
    text_length: PositiveInt = 512
    """Number of text tokens."""
    image_length: PositiveInt = 257
    """Number of image tokens."""
    rounds: PositiveInt = 5
    """Number of turns of each contender."""
    iterations: PositiveInt = 3
    """Timed optimizer steps per turn."""
    warmup_iterations: Count = 2
    """Optimizer steps of a process before the first timed one."""
    resident: bool = True
    """Keep all contenders in memory between turns. If off, each turn starts and warms up a new process."""
    num_threads: Count = 0
    """Number of threads of a process on a CPU. 0 takes torch's default."""
    json: PathText | None = None
    """JSON file for the figures."""
    worker: PathText | None = None
    """Run as the process of this contender (used by the script itself)."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""


@dataclass(frozen=True)
class BenchmarkJob:
    """Time training steps of the DiT and of diffusers' Wan."""

    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    benchmark: BenchmarkFlags = field(default_factory=BenchmarkFlags)

    def __post_init__(self) -> None:
        if self.parallel.model_parallel_size > 1:
            raise ValueError(
                f"this benchmark runs on one device, got {self.parallel.model_parallel_size} ranks a model"
            )
        if DIFFUSERS in self.benchmark.contenders and self.benchmark.text_length != 512:
            raise ValueError(f"diffusers' Wan assumes text_length 512, got {self.benchmark.text_length}")
        if self.model.text_embed_dim == 0 or self.model.image_embed_dim == 0:
            raise ValueError(
                "text_embed_dim and image_embed_dim must be positive: diffusers' image-to-video Wan has both"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in forward and backward."""
        import torch

        return torch.bfloat16 if self.training.bf16 else torch.float32

    @property
    def num_microbatches(self) -> int:
        """Number of forward and backward passes in a step."""
        return self.training.global_batch_size // self.training.micro_batch_size

    @property
    def rows(self) -> Rows:
        """Number of rows of a sample."""
        t, h, w = (side // patch for side, patch in zip(self.benchmark.latent_grid, self.model.patch_size, strict=True))
        return Rows(t * h * w, self.benchmark.text_length, self.benchmark.image_length)


def synthetic_batch(job: BenchmarkJob, device: torch.device) -> dict[str, Tensor]:
    """Make one micro-batch of random inputs, and a target [b, c, t, h, w]."""
    import torch

    model, flags, batch = job.model, job.benchmark, job.training.micro_batch_size
    shapes = {
        "model_input": (batch, model.in_channels, *flags.latent_grid),
        "text": (batch, flags.text_length, model.text_embed_dim),
        "image": (batch, flags.image_length, model.image_embed_dim),
        "target": (batch, model.latent_channels, *flags.latent_grid),
    }
    generator = torch.Generator().manual_seed(job.training.seed)
    tensors = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    return tensors | {"timesteps": torch.linspace(50.0, 950.0, batch, device=device)}


def our_step(job: BenchmarkJob) -> tuple[nn.Module, Step]:
    """Build our model and its optimizer step: Megatron's schedule, DDP buffers, clipping and AdamW."""
    import torch

    from megatron_fsvideo.models.dit import patchify
    from megatron_fsvideo.parallel import groups
    from megatron_fsvideo.tasks.dit.network import build_dit_network

    pgs = groups.initialize(job.parallel)
    # The other contender keeps no moving average.
    network = build_dit_network(replace(job, optimizer=replace(job.optimizer, ema_decay=0.0)), pgs)
    batch = synthetic_batch(job, pgs.device)
    target = patchify(batch["target"], job.model.patch_size)

    def forward_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Callable]:
        inputs = next(iterator)
        prediction = chunk(inputs["model_input"], inputs["timesteps"], inputs["text"], inputs["image"])

        def loss_function(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (prediction - target).square().mean()
            return loss, {"loss": loss.detach().clone()}

        return prediction, loss_function

    def step() -> None:
        collected = network.accumulate([batch] * job.num_microbatches, forward_step)
        loss = torch.stack([entry["loss"] for entry in collected]).mean().item()
        assert network.step(0, loss).has_stepped, f"the loss is {loss}"

    return network.model, step


def diffusers_step(job: BenchmarkJob) -> tuple[nn.Module, Step]:
    """Build diffusers' Wan and its optimizer step: gradients copied to fp32 masters, clipping, torch's AdamW."""
    import torch
    from torch import nn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_wan(job, device)
    parameters = list(model.parameters())
    master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in parameters]
    settings, beta = job.optimizer, (job.optimizer.adam_beta1, job.optimizer.adam_beta2)
    optimizer = torch.optim.AdamW(
        master, lr=settings.lr, betas=beta, eps=settings.adam_eps, weight_decay=settings.weight_decay
    )
    batch = synthetic_batch(job, device)
    inputs = {
        "hidden_states": batch["model_input"].to(job.dtype),
        "timestep": batch["timesteps"],
        "encoder_hidden_states": batch["text"].to(job.dtype),
        "encoder_hidden_states_image": batch["image"].to(job.dtype),
    }

    def step() -> None:
        total_loss = 0.0
        for _ in range(job.num_microbatches):
            prediction = model(**inputs, return_dict=False)[0]
            loss = (prediction.float() - batch["target"]).square().mean()
            (loss / job.num_microbatches).backward()
            total_loss += loss.detach()
        for parameter, copy in zip(parameters, master, strict=True):
            if copy is not parameter:
                copy.grad, parameter.grad = parameter.grad.float(), None
        if settings.clip_grad > 0:
            nn.utils.clip_grad_norm_(master, settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(parameters, master)
        assert torch.isfinite(total_loss), "the loss is not finite"

    return model, step


def build_wan(job: BenchmarkJob, device: torch.device) -> nn.Module:
    """Build diffusers' transformer of our sizes, in its types for training."""
    diffusers = require("diffusers", "test")
    config = job.model
    with device:
        model = diffusers.WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.latent_channels,
            text_dim=config.text_embed_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_hidden_size,
            num_layers=config.num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=config.layernorm_epsilon,
            image_dim=config.image_embed_dim,
            added_kv_proj_dim=config.hidden_size,
        )
    for name, parameter in model.named_parameters():
        if not any(part in name for part in DIFFUSERS_FP32):
            parameter.data = parameter.data.to(job.dtype)
    if job.parallel.recompute_granularity == "full":
        model.enable_gradient_checkpointing()
    return model.train()


def work(job: BenchmarkJob) -> None:
    """Run a contender's process: warm up, then obey the commands on stdin until it closes."""
    import torch

    flags = job.benchmark
    if flags.num_threads:
        torch.set_num_threads(flags.num_threads)
    torch.manual_seed(job.training.seed)
    if flags.worker == DIFFUSERS:
        torch.set_flush_denormal(True)  # as our optimizer does
        model, step = diffusers_step(job)
    else:
        has_memory = flags.worker == OURS
        model, step = our_step(replace(job, model=replace(job.model, layer_memory=has_memory)))
    for _ in range(flags.warmup_iterations):
        step()
    answer({"num_parameters": sum(p.numel() for p in model.parameters())})
    for line in sys.stdin:
        answer({"seconds": [_timed(step) for _ in range(int(line))], "peak_memory_bytes": _peak_memory()})


def _timed(step: Step) -> float:
    _wait_for_device()
    started = time.perf_counter()
    step()
    _wait_for_device()
    return time.perf_counter() - started


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(job: BenchmarkJob) -> dict[str, Any]:
    """Let the contenders take turns, and return the figures."""
    import torch

    from megatron_fsvideo.parallel.machine import describe_measurement

    flags = job.benchmark
    if flags.num_threads:
        torch.set_num_threads(flags.num_threads)  # for the report; each contender's process sets its own number
    resident = {name: Contender(name) for name in flags.contenders} if flags.resident else {}
    seconds: dict[str, list[list[float]]] = {name: [] for name in flags.contenders}
    known: dict[str, dict[str, int]] = {name: {} for name in flags.contenders}
    for index in range(flags.rounds):
        for name in flags.contenders:
            contender = resident[name] if flags.resident else Contender(name)
            answer = contender.ask(str(flags.iterations))
            seconds[name].append(answer["seconds"])
            known[name] = {
                "num_parameters": contender.facts["num_parameters"],
                "peak_memory_bytes": max(answer["peak_memory_bytes"], known[name].get("peak_memory_bytes", 0)),
            }
            print(f"round {index + 1}: {name:20} {statistics.median(answer['seconds']):.4f} s", flush=True)
            if not flags.resident:
                contender.close()
    for contender in resident.values():
        contender.close()
    results = {name: known[name] | figures(job, name, seconds[name]) for name in flags.contenders}
    return {"measurement": describe_measurement(), "sizes": sizes(job), "results": results, "ratios": ratios(seconds)}


def figures(job: BenchmarkJob, name: str, seconds: list[list[float]]) -> dict[str, Any]:
    """Compute the speed of one contender from its seconds by round."""
    from megatron_fsvideo.parallel.machine import device_name

    model = replace(job.model, layer_memory=job.model.layer_memory and name == OURS)
    median = statistics.median(second for turn in seconds for second in turn)
    batch = job.training.global_batch_size
    tflops = batch * total(training_flops(model, job.rows)) / median / 1e12
    peak = job.logging.peak_tflops or peak_tflops(device_name())
    return {
        "step_seconds": median,
        "step_seconds_by_round": seconds,
        "tokens_per_second": batch * job.rows.tokens / median,
        "model_tflops": tflops,
        "hardware_tflops": batch * total(hardware_flops(model, job.rows, job.parallel)) / median / 1e12,
        "mfu": tflops / peak if peak else None,
    }


def ratios(seconds: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """Compute the ratios of the contenders' step times."""
    pairs = ((WITHOUT_MEMORY, DIFFUSERS), (OURS, WITHOUT_MEMORY), (OURS, DIFFUSERS))
    return {
        f"{above} / {below}": ratio(seconds[above], seconds[below])
        for above, below in pairs
        if above in seconds and below in seconds
    }


def sizes(job: BenchmarkJob) -> dict[str, Any]:
    """The sizes that all contenders have in common."""
    model, training = job.model, job.training
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "tokens": job.rows.tokens,
        "text_tokens": job.rows.text,
        "image_tokens": job.rows.image,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "recompute_granularity": job.parallel.recompute_granularity,
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{'contender':20} {'s/step':>9} {'tokens/s':>11} {'TFLOP/s':>9} {'MFU':>7} {'peak GB':>8}")
    for name, row in result["results"].items():
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "-"
        print(
            f"{name:20} {row['step_seconds']:9.4f} {row['tokens_per_second']:11.1f} {row['model_tflops']:9.3f} "
            f"{mfu:>7} {row['peak_memory_bytes'] / 1e9:8.2f}"
        )
    for name, found in result["ratios"].items():
        print(f"{name}: {found['median']:.3f} (rounds {found['min']:.3f} to {found['max']:.3f})")


def main() -> None:
    """Parse the command line, measure, print the table and write the report."""
    job = parse_job(BenchmarkJob, presets_for(BenchmarkJob, DIT_PRESETS))
    if job.benchmark.worker:
        return work(job)
    check_outputs([job.benchmark.json] if job.benchmark.json else [], overwrite=job.benchmark.overwrite)
    result = measure(job)
    show(result)
    if job.benchmark.json:
        write_json(job.benchmark.json, result)


if __name__ == "__main__":
    run_script(main)
