"""Time video autoencoders on the same clip: FSAE-Standard, FSAE-Lite, and diffusers' Wan and LTX-Video VAEs.

    python tools/benchmark_fsae.py --size debug --clip 9 64 64 --dtype fp32 --rounds 1 --json runs/fsae.json

    python tools/benchmark_fsae.py --clip 17 256 256 --tile-rows 2 --tile-columns 2 --tile-overlap 1 \
        --json docs/benchmarks/fsae_cpu.json

Random weights at the published sizes. Each contender runs in a process of its own; they take turns, so that a machine
that slows down slows down all. Each encodes the clip and decodes latents of its own shape to all frames of the clip.
docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_fsvideo.benchmarking.contenders import Contender, answer, ratio
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job, parse_job, require, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ContenderName = Literal["standard", "standard_tiled", "lite", "lite_streamed", "lite_tiled", "wan", "ltx"]
PhaseName = Literal["encode", "first_frame", "decode"]
CONTENDERS, PHASES = get_args(ContenderName), get_args(PhaseName)
*OURS, WAN, LTX = CONTENDERS

# The classes' defaults are the published sizes: Wan 2.1's VAE, and LTX-Video 0.9.0's.
PAPER_SIZES: dict[str, dict[str, Any]] = {WAN: {}, LTX: {}}
DEBUG_SIZES: dict[str, dict[str, Any]] = {
    WAN: {"base_dim": 8, "z_dim": 4},
    LTX: {
        "latent_channels": 8,
        "block_out_channels": (8, 16, 16, 16),
        "decoder_block_out_channels": (8, 16, 16, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
}


@dataclass(frozen=True)
class BenchmarkFlags(Checked):
    """what is measured"""

    contenders: tuple[ContenderName, ...] = CONTENDERS
    """Autoencoders to compare."""
    phases: tuple[PhaseName, ...] = PHASES
    """Parts to time; first_frame is the features of the first frame, once per video."""
    size: Literal["paper", "debug"] = "paper"
    """Published sizes, or tiny sizes to try the script."""
    clip: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Frames, height and width of the clip: 8k + 1 frames, sides that are multiples of 64. None takes 17 256 256 on a
    CPU and 121 768 1280 on a GPU."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations."""
    stream_latents: PositiveInt = 1
    """Latent frames that lite_streamed and lite_tiled process at a time."""
    tile_latents: PositiveInt = 16
    """Latent frames of a tile of standard_tiled. Neighbouring tiles share a quarter of them."""
    tile_rows: PositiveInt = 8
    """Latent rows of a spatial tile (standard_tiled, lite_tiled). 8 rows are 512 pixels."""
    tile_columns: PositiveInt = 8
    """Latent columns of a spatial tile."""
    tile_overlap: Count = 2
    """Latent rows and columns that two neighbouring tiles share."""
    rounds: PositiveInt = 3
    """Number of turns of each contender."""
    iterations: PositiveInt = 1
    """Timed repetitions per turn."""
    resident: bool = True
    """Keep all contenders in memory between turns. If off, each turn starts and warms up a new process."""
    num_threads: Count = 0
    """Number of threads of a process on a CPU. 0 takes torch's default."""
    seed: Count = 1
    """Seed of weights, clip and latents."""
    json: PathText | None = None
    """JSON file for the figures."""
    worker: PathText | None = None
    """Run as the process of this contender (used by the script itself)."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        frames, height, width = self.clip or (1, 64, 64)
        if frames % 8 != 1 or height % 64 or width % 64:
            raise ValueError(
                f"a clip for all contenders has 8k+1 frames and sides that are multiples of 64, got {self.clip}"
            )


@dataclass(frozen=True)
class BenchmarkJob:
    """Time video autoencoders on the same clip."""

    benchmark: BenchmarkFlags = field(default_factory=BenchmarkFlags)


@dataclass(frozen=True)
class Subject:
    """An autoencoder on its device.

    Attributes:
        factors: (frames, pixels) per latent position.
        latent_channels: number of latent channels.
        parts: the modules that encode, and those that decode.
        encode: video -> latents.
        first_frame: first frame -> features for the decoder; None if the decoder takes none.
        decode: (latents, features) -> video.
    """

    factors: tuple[int, int]
    latent_channels: int
    parts: tuple[nn.Module, nn.Module]
    encode: Callable[[Tensor], Tensor]
    first_frame: Callable[[Tensor], list[Tensor]] | None
    decode: Callable[[Tensor, list[Tensor] | None], Tensor]

    def latent_shape(self, clip: tuple[int, int, int]) -> tuple[int, ...]:
        """Latent shape [1, c, t, h, w] of a clip (frames, height, width)."""
        frames, side = self.factors
        return 1, self.latent_channels, (clip[0] - 1) // frames + 1, clip[1] // side, clip[2] // side


def clip_shape(flags: BenchmarkFlags) -> tuple[int, int, int]:
    """Frames, height and width of the clip on this machine."""
    import torch

    return flags.clip or ((121, 768, 1280) if torch.cuda.is_available() else (17, 256, 256))


def contender_subject(flags: BenchmarkFlags, name: str, device: torch.device) -> Subject:
    """Build one of CONTENDERS with random weights on `device`."""
    return (our_subject if name in OURS else foreign_subject)(flags, name, device)


def our_subject(flags: BenchmarkFlags, name: str, device: torch.device) -> Subject:
    """Build FSAE-Standard or FSAE-Lite, whole, streamed or tiled."""
    import torch

    from megatron_fsvideo.models.fsae import FSAE
    from megatron_fsvideo.models.fsae.tiling import Tiling, decode_frames, encode_frames

    kind, _, way = name.partition("_")
    preset = FSAE_PRESETS[f"fsae_{kind}" + ("_debug" if flags.size == "debug" else "")]
    with torch.device("meta"):
        fsae = FSAE(build_job(FSAEJob, preset).model)
    fill(fsae, flags, device)
    facts = ((fsae.temporal_factor, fsae.spatial_factor), fsae.latent_channels, (fsae.encoder, fsae.decoder))
    if not way:
        return Subject(*facts, fsae.encode, fsae.first_frame_features, fsae.decode)
    latents = flags.tile_latents if kind == "standard" else flags.stream_latents
    tiling = Tiling(latents, latents // 4)
    if way == "tiled":
        tiling = Tiling(latents, latents // 4, flags.tile_rows, flags.tile_columns, flags.tile_overlap)

    def encode(video: Tensor) -> Tensor:
        return torch.cat(list(encode_frames(fsae, [video], tiling)), dim=2)

    def decode(latents: Tensor, features: list[Tensor] | None) -> Tensor:
        return torch.cat(list(decode_frames(fsae, [latents], features, tiling=tiling)), dim=2)

    return Subject(*facts, encode, fsae.first_frame_features, decode)


def foreign_subject(flags: BenchmarkFlags, name: str, device: torch.device) -> Subject:
    """Build a VAE of diffusers with its default calls: Wan's slices time by itself, LTX-Video's does not."""
    import torch

    diffusers = require("diffusers", "eval")
    sizes = (PAPER_SIZES if flags.size == "paper" else DEBUG_SIZES)[name]
    with torch.device("meta"):
        vae = (diffusers.AutoencoderKLWan if name == WAN else diffusers.AutoencoderKLLTXVideo)(**sizes)
    fill(vae, flags, device)
    if name == WAN:
        channels, factors = vae.config.z_dim, (2 ** sum(vae.config.temperal_downsample), vae.spatial_compression_ratio)
    else:
        channels = vae.config.latent_channels
        factors = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    return Subject(
        factors,
        channels,
        (vae.encoder, vae.decoder),
        lambda video: vae.encode(video).latent_dist.mode(),
        None,
        lambda latents, features: vae.decode(latents).sample,
    )


def fill(model: nn.Module, flags: BenchmarkFlags, device: torch.device) -> None:
    """Give a model on the meta device random weights that preserve the scale of activations."""
    from megatron_fsvideo.parallel.dtypes import DTYPES

    model.to(DTYPES[flags.dtype]).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim > 1:
            tensor.uniform_(-1, 1).mul_((3 / tensor[0].numel()) ** 0.5)
        else:
            tensor.fill_(0.5)


def work(flags: BenchmarkFlags) -> None:
    """Run a contender's process: warm up and count, then take the turns that the lines on stdin request."""
    import torch

    from megatron_fsvideo.parallel.dtypes import DTYPES

    torch.set_grad_enabled(False)
    if flags.num_threads:
        torch.set_num_threads(flags.num_threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(flags.seed)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[flags.dtype]
    subject = contender_subject(flags, flags.worker, device)
    clip = (torch.rand(1, 3, *clip_shape(flags), device=device) * 2 - 1).to(dtype)
    features = None if subject.first_frame is None else subject.first_frame(clip[:, :, :1])
    latents = torch.randn(subject.latent_shape(clip_shape(flags)), device=device).to(dtype)
    calls = {
        "encode": lambda: subject.encode(clip),
        "first_frame": lambda: subject.first_frame(clip[:, :, :1]),
        "decode": lambda: subject.decode(latents, features),
    }
    if subject.first_frame is None:
        del calls["first_frame"]
    calls = {phase: call for phase, call in calls.items() if phase in flags.phases}
    shapes = {"encode": latents.shape, "decode": clip.shape}
    counted = {phase: count(call, device, shapes.get(phase)) for phase, call in calls.items()}
    numbers = [sum(p.numel() for p in part.parameters()) for part in subject.parts]
    sizes = {"latent": list(latents.shape), "parameters": dict(zip(("encode", "decode"), numbers, strict=True))}
    answer({"phases": counted, "bytes_per_number": dtype.itemsize, **sizes})
    runnable = {phase: call for phase, call in calls.items() if counted[phase] is not None}
    for line in sys.stdin:
        answer({phase: turn(call, int(line), device) for phase, call in runnable.items()})


def count(call: Callable[[], Any], device: torch.device, shape: Sequence[int] | None) -> dict[str, int] | None:
    """Count the operations and the allocated bytes of one call while it runs; None if memory runs out.

    Raises:
        ValueError: the result has another shape than `shape`, or is not finite.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_fsvideo.benchmarking.peak_memory import peak_allocation

    try:
        with FlopCounterMode(display=False) as counter:
            result, allocated = peak_allocation(call, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    if shape is not None and (result.shape != shape or not result.isfinite().all()):
        raise ValueError(f"made {list(result.shape)} instead of finite numbers {list(shape)}")
    return {"flops": counter.get_total_flops(), "activation_bytes": allocated}


def turn(call: Callable[[], Any], iterations: int, device: torch.device) -> dict[str, Any]:
    """Measure each call's wall seconds, CPU seconds of this process, and peak memory."""
    import torch

    from megatron_fsvideo.benchmarking.peak_memory import process_peak, reset_process_peak

    seconds, cpu_seconds = [], []
    reset_process_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(iterations):
        _wait_for(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        call()
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else process_peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other contenders need the memory
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak}


def _wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(flags: BenchmarkFlags) -> dict[str, Any]:
    """Let the contenders take turns, and return the figures."""
    import torch

    from megatron_fsvideo.parallel.machine import describe_measurement

    if flags.num_threads:
        torch.set_num_threads(flags.num_threads)  # for the report; each contender's process sets its own number
    resident = {name: Contender(name) for name in flags.contenders} if flags.resident else {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in flags.contenders}
    facts: dict[str, dict[str, Any]] = {}
    for index in range(flags.rounds):
        for name in flags.contenders:
            contender = resident[name] if flags.resident else Contender(name)
            facts[name] = contender.facts
            turns[name].append(contender.ask(str(flags.iterations)))
            spent = {phase: f"{statistics.median(row['seconds']):.3f} s" for phase, row in turns[name][-1].items()}
            print(f"round {index + 1}: {name:15} {spent}", flush=True)
            if not flags.resident:
                contender.close()
    for contender in resident.values():
        contender.close()
    results = {name: figures(flags, facts[name], turns[name]) for name in flags.contenders}
    return {
        "measurement": describe_measurement(),
        "clip": list(clip_shape(flags)),
        "dtype": flags.dtype,
        "size": flags.size,
        "results": results,
        "ratios": ratios(results),
    }


def figures(flags: BenchmarkFlags, facts: dict[str, Any], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One contender's figures by phase; None for a phase that ran out of memory."""
    row: dict[str, Any] = {"parameters": facts["parameters"], "latent": facts["latent"]}
    for phase, counted in facts["phases"].items():
        if counted is None:
            row[phase] = None
            continue
        by_round = [turn[phase]["seconds"] for turn in turns]
        seconds = statistics.median(second for turn in by_round for second in turn)
        weights = facts["bytes_per_number"] * facts["parameters"]["decode" if phase == "decode" else "encode"]
        row[phase] = {
            "seconds": seconds,
            "seconds_by_round": by_round,
            "cpu_seconds_by_round": [turn[phase]["cpu_seconds"] for turn in turns],
            "frames_per_second": (1 if phase == "first_frame" else clip_shape(flags)[0]) / seconds,
            "flops": counted["flops"],
            "tflops": counted["flops"] / seconds / 1e12,
            "weight_bytes": weights,
            "activation_bytes": counted["activation_bytes"],
            "peak_memory_bytes": max(turn[phase]["peak_memory_bytes"] for turn in turns),
        }
    return row


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ratios of our figures to theirs in each phase: seconds (median, least and greatest round), FLOPs and bytes.

    CPU seconds exclude the time of other programs. With one thread and no GPU they equal the time on an idle machine.
    "first frame + decode" is a decoder's whole work for a video whose first frame is given as pixels.
    """
    found: dict[str, dict[str, Any]] = {}
    for ours in (name for name in results if name in OURS):
        for theirs in (name for name in results if name not in OURS):
            pair = found[f"{ours} / {theirs}"] = {}
            for phase in ("encode", "decode"):
                a, b = results[ours].get(phase), results[theirs].get(phase)
                if a is None or b is None:
                    continue
                pair[phase] = {
                    what: ratio(a[f"{what}_by_round"], b[f"{what}_by_round"]) for what in ("seconds", "cpu_seconds")
                }
                for what in ("flops", "activation_bytes", "peak_memory_bytes"):
                    pair[phase][what] = a[what] / b[what]
                both = [row["weight_bytes"] + row["activation_bytes"] for row in (a, b)]
                pair[phase]["weight_and_activation_bytes"] = both[0] / both[1]
            first, decode = (results[ours].get(phase) for phase in ("first_frame", "decode"))
            other = results[theirs].get("decode")
            if None not in (first, decode, other):
                pair["first frame + decode"] = {"seconds": ratio(_added(first, decode), other["seconds_by_round"])}
    return found


def _added(*phases: dict[str, Any]) -> list[list[float]]:
    rounds = zip(*(phase["seconds_by_round"] for phase in phases), strict=True)
    return [[sum(calls) for calls in zip(*turns, strict=True)] for turns in rounds]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"\n{'contender':15} {'phase':12} {'seconds':>9} {'frames/s':>9} {'TFLOP':>9} {'TFLOP/s':>8} "
        f"{'weights GB':>11} {'activations GB':>15} {'peak GB':>8}"
    )
    for name, row in result["results"].items():
        for phase in (phase for phase in PHASES if phase in row):
            if (found := row[phase]) is None:
                print(f"{name:15} {phase:12} out of memory")
                continue
            print(
                f"{name:15} {phase:12} {found['seconds']:9.3f} {found['frames_per_second']:9.2f} "
                f"{found['flops'] / 1e12:9.3f} {found['tflops']:8.3f} {found['weight_bytes'] / 1e9:11.3f} "
                f"{found['activation_bytes'] / 1e9:15.3f} {found['peak_memory_bytes'] / 1e9:8.2f}"
            )
    for pair, phases in result["ratios"].items():
        for phase, found in phases.items():
            print(f"{pair}, {phase}: " + ", ".join(_ratio_words(what, value) for what, value in found.items()))


def _ratio_words(what: str, value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{what} {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})"
    return f"{what} {value:.3f}"


def main() -> None:
    """Parse the command line, measure, print the table and write the report."""
    flags = parse_job(BenchmarkJob).benchmark
    if flags.worker:
        return work(flags)
    check_outputs([flags.json] if flags.json else [], overwrite=flags.overwrite)
    result = measure(flags)
    show(result)
    if flags.json:
        write_json(flags.json, result)


if __name__ == "__main__":
    run_script(main)
