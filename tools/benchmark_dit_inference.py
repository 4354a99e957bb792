"""Time the DiT part of generation, which the paper's Table 4 reports, with random weights.

    python tools/benchmark_dit_inference.py --preset dit_14b --json runs/inference.json           # one GPU, Table 4

    python tools/benchmark_dit_inference.py --preset dit_debug --base-grid 2 4 4 --base-steps 2 --refiner-grid 2 4 8 \
        --refiner-steps 2 --text-length 8 --image-length 5                                       # seconds on a CPU

Timed are the base DiT with guidance (30 steps, 60 evaluations, 384x640x121) and the refiner (8 steps, 768x1280x121).
Encoders, autoencoder and upsampler are left out, as in Table 4. Under torchrun with --context-parallel-size or
--tensor-model-parallel-size several devices share each sample. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_fsvideo.config import (
    DIT_PRESETS,
    DiffusionConfig,
    DiTConfig,
    DiTParallelConfig,
    LoggingConfig,
    TrainingConfig,
    check_token_count,
    parse_job,
    presets_for,
    run_script,
)
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json
from megatron_fsvideo.models.flops import Rows, forward_flops, peak_tflops, total

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fsvideo.diffusion.guidance import Velocity
    from megatron_fsvideo.models.dit import DiTModel
    from megatron_fsvideo.parallel.groups import ProcessGroups

# Table 4: number of H100s -> seconds of 60 + 8 evaluations in bf16 without offloading (the first is an estimate).
PAPER_SECONDS = {1: 27.4, 2: 19.4}
GUIDANCE_SCALE = 5.0


@dataclass(frozen=True)
class BenchmarkFlags(Checked):
    """what is measured; the defaults are Table 4's"""

    base_grid: tuple[PositiveInt, PositiveInt, PositiveInt] = (31, 6, 10)
    """Latent frames, rows and columns of the base DiT."""
    base_steps: PositiveInt = 30
    """Steps of the base DiT. Each step evaluates it twice, with the prompt and without."""
    refiner_grid: tuple[PositiveInt, PositiveInt, PositiveInt] = (31, 12, 20)
    """Latent frames, rows and columns of the refiner."""
    refiner_steps: PositiveInt = 8
    """Steps of the refiner. Each step evaluates it once."""
    batch_guidance: bool = False
    """Evaluate with and without the prompt as one batch of two. If off, one after the other, as the pipeline does."""
    two_models: bool = False
    """Give the refiner its own weights. If off, both stages use one model: half the memory in the same time."""
    text_length: PositiveInt = 512
    """Number of text tokens."""
    image_length: PositiveInt = 257
    """Number of image tokens."""
    runs: PositiveInt = 3
    """Number of times that everything is generated."""
    num_threads: Count = 0
    """Number of threads on a CPU. 0 takes torch's default."""
    json: PathText | None = None
    """JSON file for the figures."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""


@dataclass(frozen=True)
class BenchmarkJob:
    """Time the DiT part of generation."""

    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    benchmark: BenchmarkFlags = field(default_factory=BenchmarkFlags)

    def __post_init__(self) -> None:
        if self.parallel.pipeline_model_parallel_size > 1:
            raise ValueError("generation runs with tensor and context parallelism, not with pipeline stages")
        for stage in stages(self):
            check_token_count(self.rows(stage).tokens, f"the {stage.name}'s grid {stage.grid}", self.parallel)

    def rows(self, stage: Stage) -> Rows:
        """Number of rows of one sample in a stage."""
        t, h, w = (side // patch for side, patch in zip(stage.grid, self.model.patch_size, strict=True))
        return Rows(t * h * w, self.benchmark.text_length, self.benchmark.image_length)

    @property
    def is_table_4(self) -> bool:
        """Whether these are the paper's sizes."""
        flags, paper = self.benchmark, BenchmarkFlags()
        names = ("base_grid", "base_steps", "refiner_grid", "refiner_steps", "text_length", "image_length")
        return self.model == DiTConfig() and all(getattr(flags, name) == getattr(paper, name) for name in names)


@dataclass(frozen=True)
class Stage:
    """One of the two DiTs with its samples and steps."""

    name: str
    grid: tuple[int, int, int]
    steps: int
    is_guided: bool

    @property
    def evaluations(self) -> int:
        """Number of forward passes of one sample."""
        return self.steps * (2 if self.is_guided else 1)


def stages(job: BenchmarkJob) -> list[Stage]:
    """The two stages, base and refiner."""
    flags = job.benchmark
    return [
        Stage("base", flags.base_grid, flags.base_steps, True),
        Stage("refiner", flags.refiner_grid, flags.refiner_steps, False),
    ]


def random_model(job: BenchmarkJob, pgs: ProcessGroups) -> DiTModel:
    """Build a DiT with random weights, drawn on its device: gains near 1, all others near 0."""
    import torch

    from megatron_fsvideo.models.dit import build_dit

    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    model = build_dit(job.model, job.parallel, pgs, params_dtype=dtype, device=torch.device("meta"))
    model = model.to_empty(device=pgs.device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02)
    return model


def velocity_function(job: BenchmarkJob, model: DiTModel, stage: Stage, pgs: ProcessGroups) -> Velocity:
    """The velocity function of a stage under random conditions, with guidance if the stage uses it."""
    import torch

    from megatron_fsvideo.diffusion.conditions import first_frame_condition
    from megatron_fsvideo.diffusion.guidance import guided
    from megatron_fsvideo.models.dit import Denoiser

    config, flags = job.model, job.benchmark
    latents = torch.randn(1, config.latent_channels, *stage.grid, device=pgs.device)
    texts = torch.randn(2, flags.text_length, config.text_embed_dim, device=pgs.device)
    images = torch.randn(1, flags.image_length, config.image_embed_dim, device=pgs.device).expand(2, -1, -1)
    denoiser = Denoiser(model, job.diffusion.prediction_type)

    def under(which: slice) -> Velocity:
        text, image = texts[which], images[which]
        clips = latents.expand(len(text), -1, -1, -1, -1)
        return denoiser.under(first_frame_condition(clips, config.mask_channels, text, image))

    unconditional, conditional, evaluate = under(slice(0, 1)), under(slice(1, 2)), under(slice(0, 2))

    def both(noisy_latents: Tensor, sigmas: Tensor) -> Tensor:
        pair = noisy_latents.expand(2, -1, -1, -1, -1), sigmas.expand(2)
        without, with_prompt = evaluate(*pair).split(1)
        return without + GUIDANCE_SCALE * (with_prompt - without)

    if not stage.is_guided:
        return conditional
    return both if flags.batch_guidance else guided(conditional, unconditional, GUIDANCE_SCALE)


def timed_sampling(job: BenchmarkJob, velocity: Velocity, stage: Stage, steps: int, pgs: ProcessGroups) -> float:
    """Measure the seconds of one complete sampling."""
    import torch

    from megatron_fsvideo.diffusion.samplers import euler_sample, euler_sigmas

    noise = torch.randn(1, job.model.latent_channels, *stage.grid, device=pgs.device)
    _wait(pgs)
    started = time.perf_counter()
    latents = euler_sample(velocity, noise, euler_sigmas(steps))
    _wait(pgs)
    seconds = time.perf_counter() - started
    assert torch.isfinite(latents).all(), f"the {stage.name} put out values that are not finite"
    return seconds


def _wait(pgs: ProcessGroups) -> None:
    import torch

    from megatron_fsvideo.parallel import groups

    groups.barrier()
    if pgs.device.type == "cuda":
        torch.cuda.synchronize()


def measure(job: BenchmarkJob, pgs: ProcessGroups) -> dict[str, Any]:
    """Warm up with one step of each stage, generate `runs` times, and return the figures."""
    import torch

    from megatron_fsvideo.parallel.machine import describe_measurement, device_name

    base = random_model(job, pgs)
    models = [base, random_model(job, pgs) if job.benchmark.two_models else base]
    work = stages(job)
    velocities = [velocity_function(job, *pair, pgs) for pair in zip(models, work, strict=True)]
    seconds: dict[str, list[float]] = {stage.name: [] for stage in work}
    for stage, velocity in zip(work, velocities, strict=True):
        timed_sampling(job, velocity, stage, 1, pgs)
    for _ in range(job.benchmark.runs):
        for stage, velocity in zip(work, velocities, strict=True):
            seconds[stage.name].append(timed_sampling(job, velocity, stage, stage.steps, pgs))
    peak = job.logging.peak_tflops or peak_tflops(device_name())
    results = {stage.name: figures(job, stage, seconds[stage.name], peak, pgs.world_size) for stage in work}
    sums = {key: sum(row[key] or 0 for row in results.values()) for key in ("seconds", "petaflop", "roofline_seconds")}
    results["sum"] = {
        "evaluations": sum(stage.evaluations for stage in work),
        **sums,
        "mfu": sums["roofline_seconds"] / sums["seconds"] if peak else None,
    }
    memory = torch.cuda.max_memory_allocated() if pgs.device.type == "cuda" else None
    return {
        "measurement": describe_measurement(),
        "num_devices": pgs.world_size,
        "peak_tflops": peak,
        "peak_memory_bytes": memory,
        "is_table_4": job.is_table_4,
        "paper_seconds": PAPER_SECONDS.get(pgs.world_size) if job.is_table_4 else None,
        "results": results,
    }


def figures(
    job: BenchmarkJob, stage: Stage, seconds: list[float], peak: float | None, num_devices: int
) -> dict[str, Any]:
    """Time of a stage, its operations, and their time at the device's peak rate."""
    work = stage.evaluations * total(forward_flops(job.model, job.rows(stage)))
    median = statistics.median(seconds)
    roofline = work / (1e12 * peak * num_devices) if peak else None
    return {
        "tokens": job.rows(stage).tokens,
        "evaluations": stage.evaluations,
        "seconds": median,
        "seconds_by_run": seconds,
        "petaflop": work / 1e15,
        "roofline_seconds": roofline,
        "mfu": roofline / median if roofline else None,
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'stage':9} {'NFE':>4} {'seconds':>9} {'s/NFE':>9} {'PFLOP':>9} {'roofline s':>11} {'MFU':>7}")
    for name, row in result["results"].items():
        roofline = f"{row['roofline_seconds']:.3f}" if row["mfu"] else "-"
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "-"
        print(
            f"{name:9} {row['evaluations']:4} {row['seconds']:9.3f} {row['seconds'] / row['evaluations']:9.4f} "
            f"{row['petaflop']:9.4g} {roofline:>11} {mfu:>7}"
        )
    if result["paper_seconds"]:
        seconds = result["results"]["sum"]["seconds"]
        print(f"paper, Table 4, {result['num_devices']} H100: {result['paper_seconds']} s; here {seconds:.2f} s")
    elif not result["is_table_4"]:
        print(f"not the sizes of Table 4, whose {PAPER_SECONDS[1]} s (one H100) are therefore no comparison")


def run(job: BenchmarkJob) -> None:
    """Measure, print the table and write the report."""
    import torch

    from megatron_fsvideo.parallel import groups

    check_outputs([job.benchmark.json] if job.benchmark.json else [], overwrite=job.benchmark.overwrite)
    if job.benchmark.num_threads:
        torch.set_num_threads(job.benchmark.num_threads)
    pgs = groups.initialize(job.parallel)
    torch.manual_seed(job.training.seed)  # equal on all ranks, which share each sample
    result = measure(job, pgs)
    if pgs.is_rank_zero:
        show(result)
        if job.benchmark.json:
            write_json(job.benchmark.json, result)
    groups.shutdown()


def main() -> None:
    """Parse the command line and measure."""
    run(parse_job(BenchmarkJob, presets_for(BenchmarkJob, DIT_PRESETS)))


if __name__ == "__main__":
    run_script(main)
