"""Time the kernels of layer memory: forward and backward of all layers of a model, in bytes per second beside a copy.

    python tools/benchmark_layer_memory.py --json runs/layer_memory.json                # one GPU, the 14B's sizes

    python tools/benchmark_layer_memory.py --hidden-size 256 --tokens 496 --num-layers 8 --num-threads 1    # a CPU

Layer l of 2 .. L mixes l states; the backward pass runs in the order of training and pulls each state's gradient once.
`einsum` is the implementation without kernels: stack, einsum and autograd, which adds each layer's gradients to
those of the states. Bandwidth is the least number of bytes that must move by the time taken, whatever an
implementation moves. docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from msgspec import Meta

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_fsvideo.kernels import Mixer, MixSettings

Implementation = Literal["triton", "torch", "einsum"]
TRITON, TORCH, EINSUM = get_args(Implementation)
OPERATIONS = {"forward": ("mix",), "backward": ("mix_backward", "pull")}
EPSILON = 1e-6


@dataclass(frozen=True)
class BenchmarkFlags(Checked):
    """what is measured; the defaults are the 14B model's at 1024x1024x121"""

    implementations: tuple[Implementation, ...] = ()
    """Implementations to compare. By default all; triton only where there is a GPU."""
    hidden_size: PositiveInt = 5120
    """Width of a hidden state."""
    tokens: PositiveInt = 7936
    """Tokens of a sample on this device. 7936 tokens are 31x16x16 latents."""
    num_layers: Annotated[int, Meta(ge=2)] = 40
    """Layers of the model. All but the first read layer memory."""
    micro_batch_size: PositiveInt = 1
    """Samples in one pass."""
    layer_memory_norm: Literal["raw", "normalized"] = "raw"
    """Order of mixing and norm, as in training."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the hidden states."""
    rounds: PositiveInt = 5
    """Timed passes of each implementation. They take turns."""
    num_threads: Count = 0
    """Number of threads on a CPU. 0 takes torch's default."""
    json: PathText | None = None
    """JSON file for the figures."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""


@dataclass(frozen=True)
class BenchmarkJob:
    """Time the kernels of layer memory."""

    benchmark: BenchmarkFlags = field(default_factory=BenchmarkFlags)


def implementations_of(flags: BenchmarkFlags) -> tuple[str, ...]:
    """The implementations that take part on this machine.

    Raises:
        ValueError: Triton's kernels without a CUDA device.
    """
    import torch

    if TRITON in flags.implementations and not torch.cuda.is_available():
        raise ValueError("Triton's kernels need a CUDA device, and there is none: leave triton out")
    has_triton = torch.cuda.is_available() and find_spec("triton") is not None
    return flags.implementations or ((TRITON, TORCH, EINSUM) if has_triton else (TORCH, EINSUM))


def settings_of(flags: BenchmarkFlags) -> MixSettings:
    """The model's settings of layer memory."""
    from megatron_fsvideo.kernels import MixSettings

    return MixSettings(flags.layer_memory_norm == "normalized", EPSILON)


@dataclass(frozen=True)
class Case:
    """One micro-batch: s tokens, b samples, h channels.

    Attributes:
        states: X_0 .. X_{L-1}, each [s, b, h]; layer l reads the first l.
        logits: layer l -> [s, b, l], fp32.
        shift, scale: [b, h], fp32.
        gradient: gradient [s, b, h] of every layer's output, and direct gradient of every state.
    """

    states: list[Tensor]
    logits: dict[int, Tensor]
    shift: Tensor
    scale: Tensor
    gradient: Tensor


class Stopwatch:
    """Seconds of named spans on a device; spans may nest."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context whose run time is added to the span `name`."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each name, summed over its spans."""
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            sums[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(sums)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def make_case(flags: BenchmarkFlags, device: torch.device) -> Case:
    """Random states, logits and gradients."""
    import torch

    from megatron_fsvideo.parallel.dtypes import DTYPES

    shape = (flags.tokens, flags.micro_batch_size, flags.hidden_size)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    dtype = DTYPES[flags.dtype]
    return Case(
        states=[draw(*shape, dtype=dtype) for _ in range(flags.num_layers)],
        logits={number: draw(*shape[:2], number) for number in range(2, flags.num_layers + 1)},
        shift=draw(*shape[1:]),
        scale=0.1 * draw(*shape[1:]),
        gradient=draw(*shape, dtype=dtype),
    )


def run_mixer(mixer: Mixer, case: Case, settings: MixSettings, watch: Stopwatch) -> tuple[Tensor, list[Tensor]]:
    """Run forward and backward as the bank does; return the last layer's output and the states' gradients."""
    results, reads, gradients = [], [], []
    with watch("forward"):
        for number, logits in case.logits.items():
            with watch("mix"):
                results.append(mixer.mix(logits, case.states[:number], case.shift, case.scale, settings))
    output = results[-1].output
    with watch("backward"):
        for number in reversed(range(1, len(case.states) + 1)):
            if number >= 2:  # layer 1 reads nothing
                result, states = results.pop(), case.states[:number]
                with watch("mix_backward"):
                    mixed, *_ = mixer.mix_backward(case.gradient, result, states, case.scale, settings)
                reads.append((result.weights, mixed))
            with watch("pull"):
                pulled = mixer.pull([case.gradient], number - 1, reads, case.states[number - 1], settings)
            gradients.append(pulled)
    return output, gradients[::-1]


def run_einsum(case: Case, settings: MixSettings, watch: Stopwatch) -> tuple[Tensor, list[Tensor]]:
    """Run the case with einsum and autograd instead of the kernels."""
    import torch

    outputs, leaves = [], []
    with watch("forward"):
        for number, logits in case.logits.items():
            leaves.append(
                [t.detach().requires_grad_() for t in (logits, case.shift, case.scale, *case.states[:number])]
            )
            outputs.append(mix_by_einsum(*leaves[-1][:3], leaves[-1][3:], settings))
    output = outputs[-1].detach()
    gradients = [case.gradient.clone() for _ in case.states]
    with watch("backward"):
        while outputs:
            found = torch.autograd.grad(outputs.pop(), leaves.pop(), case.gradient)[3:]
            for total, gradient in zip(gradients, found, strict=False):
                total += gradient
    return output, gradients


def mix_by_einsum(logits: Tensor, shift: Tensor, scale: Tensor, states: list[Tensor], settings: MixSettings) -> Tensor:
    """Mix the states like `Mixer.mix`, in their dtype except for softmax, norm and modulation."""
    import torch
    import torch.nn.functional as F

    stacked = torch.stack(states)  # (l, s, b, h)
    channels = stacked.shape[-1:]
    if settings.norms_states:
        stacked = F.layer_norm(stacked.float(), channels, eps=settings.epsilon).to(stacked.dtype)
    memory = torch.einsum("sbl,lsbh->sbh", logits.softmax(-1).to(stacked.dtype), stacked).float()
    normed = memory if settings.norms_states else F.layer_norm(memory, channels, eps=settings.epsilon)
    return (normed * (1 + scale) + shift).to(stacked.dtype)


def least_bytes(flags: BenchmarkFlags) -> dict[str, int]:
    """Bytes that each operation must read and write in a pass over all layers when nothing is recomputed."""
    from megatron_fsvideo.parallel.dtypes import DTYPES

    rows, fp32 = flags.tokens * flags.micro_batch_size, 4
    channels = flags.micro_batch_size * flags.hidden_size * fp32  # shift, scale or a gradient of them
    state = rows * flags.hidden_size * DTYPES[flags.dtype].itemsize
    norms_states = settings_of(flags).norms_states
    # The mix is kept for the backward pass: raw in the states' dtype with mean and rstd, normed in fp32.
    memory = rows * flags.hidden_size * fp32 if norms_states else state + 2 * rows * fp32
    sums = {"mix": 0, "mix_backward": 0, "pull": 0}
    for number in range(1, flags.num_layers + 1):
        num_reads = min(flags.num_layers - number + 1, flags.num_layers - 1)
        sums["pull"] += (num_reads + 2 + norms_states) * state + num_reads * rows * fp32
        if number >= 2:
            weights = 2 * number * rows * fp32  # logits in, weights out, and the other way
            sums["mix"] += (number + 1) * state + memory + weights + 2 * channels
            sums["mix_backward"] += (number + 2) * state + memory + weights + 3 * channels
    return sums


def copy_once(states: list[Tensor], targets: list[Tensor], watch: Stopwatch) -> None:
    """Copy every state, one after another."""
    with watch("copy"):
        for state, target in zip(states, targets, strict=True):
            target.copy_(state)


def measure(flags: BenchmarkFlags, device: torch.device) -> dict[str, Any]:
    """Let the implementations take turns, and return the figures."""
    import torch

    from megatron_fsvideo.parallel.machine import describe_measurement

    case = make_case(flags, device)
    targets = [torch.empty_like(state) for state in case.states]
    programs: dict[str, Callable[[Stopwatch], Any]] = {"copy": lambda watch: copy_once(case.states, targets, watch)}
    for name in implementations_of(flags):
        programs[name] = _program(name, case, settings_of(flags))
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for index in range(flags.rounds + 1):  # the first pass compiles and warms up
        for name, program in programs.items():
            watch = Stopwatch(device)
            program(watch)
            if index:
                seconds[name].append(watch.seconds())
    copied = 2 * sum(state.nbytes for state in case.states)
    copy = figures([turn["copy"] for turn in seconds.pop("copy")], copied)
    results = {name: by_operation(turns, least_bytes(flags), copy) for name, turns in seconds.items()}
    sizes = {name: getattr(flags, name) for name in ("hidden_size", "tokens", "num_layers", "micro_batch_size")}
    sizes |= {"dtype": flags.dtype, "layer_memory_norm": flags.layer_memory_norm, "state_bytes": case.states[0].nbytes}
    return {"measurement": describe_measurement(), "sizes": sizes, "copy": copy, "results": results}


def _program(name: str, case: Case, settings: MixSettings) -> Callable[[Stopwatch], Any]:
    from megatron_fsvideo.kernels import mixer_for

    if name == EINSUM:
        return lambda watch: run_einsum(case, settings, watch)
    mixer = mixer_for(name, case.gradient.device)
    return lambda watch: run_mixer(mixer, case, settings, watch)


def by_operation(
    turns: list[dict[str, float]], moved: dict[str, int], copy: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Figures of forward and backward, and of their separate operations where the implementation has them."""
    moved = moved | {phase: sum(moved[name] for name in names) for phase, names in OPERATIONS.items()}
    found = {name: figures([turn[name] for turn in turns], moved[name]) for name in turns[0]}
    for row in found.values():
        row["of_copy"] = row["bytes_per_second"] / copy["bytes_per_second"]
    return found


def figures(seconds: list[float], moved: int) -> dict[str, Any]:
    """Median and bandwidth from the seconds of passes."""
    median = statistics.median(seconds)
    return {"seconds": median, "seconds_by_round": seconds, "bytes": moved, "bytes_per_second": moved / median}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    copy = result["copy"]
    print(f"{'':8} {'':13} {'ms':>10} {'GB':>9} {'GB/s':>9} {'of copy':>8} {'rounds, ms':>21}")
    rows = [("copy", "", copy | {"of_copy": 1.0})]
    rows += [(name, operation, row) for name, found in result["results"].items() for operation, row in found.items()]
    for name, operation, row in rows:
        least, greatest = (1e3 * extreme(row["seconds_by_round"]) for extreme in (min, max))
        print(
            f"{name:8} {operation:13} {1e3 * row['seconds']:10.3f} {row['bytes'] / 1e9:9.3f} "
            f"{row['bytes_per_second'] / 1e9:9.1f} {100 * row['of_copy']:6.1f} % {least:10.3f}-{greatest:.3f}"
        )


def run(flags: BenchmarkFlags) -> None:
    """Measure, print the table and write the report."""
    import torch

    check_outputs([flags.json] if flags.json else [], overwrite=flags.overwrite)
    if flags.num_threads:
        torch.set_num_threads(flags.num_threads)
    result = measure(flags, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    show(result)
    if flags.json:
        write_json(flags.json, result)


def main() -> None:
    """Parse the command line and measure."""
    run(parse_job(BenchmarkJob).benchmark)


if __name__ == "__main__":
    run_script(main)
