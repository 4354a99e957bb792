"""The log of a run: metrics.jsonl, TensorBoard events, and a progress bar or plain lines on rank 0."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fsvideo.config import LoggingConfig, require
from megatron_fsvideo.data.outputs import try_folder, write_text
from megatron_fsvideo.data.text_files import read_jsonl, read_lines
from megatron_fsvideo.models.flops import peak_tflops
from megatron_fsvideo.parallel.machine import device_name
from megatron_fsvideo.training.state import StepResult, TrainState

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics_dropped.jsonl"


class MetricsLogger:
    """Writes metrics; does nothing on ranks other than zero.

    Every logged iteration is one JSON object in metrics.jsonl, with the values of that iteration (no averages:
    a restarted run writes the same lines), except `iteration_time` and figures derived from it, which average over the
    iterations since the last line.

    Args:
        resume_iteration: where the run continues. Later lines of metrics.jsonl, which a run wrote that was killed
            before it saved, are moved to metrics_dropped.jsonl, because the iterations are done again. A run that
            starts anew moves all lines there.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        train_iters: int,
        resume_iteration: int = 0,
        *,
        is_rank_zero: bool = True,
        world_size: int = 1,
    ) -> None:
        self._interval = logging.log_interval
        self._train_iters = train_iters
        self._first = resume_iteration
        self._world_size = world_size
        self._peak_tflops = logging.peak_tflops or peak_tflops(device_name())
        self._active = is_rank_zero
        self._window: list[tuple[float, StepResult]] = []
        self._file = self._tensorboard = self._bar = None
        if not is_rank_zero:
            return
        self._started = time.perf_counter()
        if logging.tensorboard_dir is not None:
            folder = Path(logging.tensorboard_dir)
            try_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if dropped := truncate_metrics(folder / METRICS_FILE, resume_iteration):
                print(f"{dropped} lines of {folder / METRICS_FILE} are moved to {DROPPED_FILE}", flush=True)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
            tensorboard = require("torch.utils.tensorboard", "train")
            self._tensorboard = tensorboard.SummaryWriter(str(folder), purge_step=resume_iteration + 1)
        if sys.stderr.isatty():
            tqdm = require("tqdm", "train")
            self._bar = tqdm.tqdm(
                total=train_iters,
                initial=resume_iteration,
                unit="it",
                dynamic_ncols=True,
            )

    def log_step(self, state: TrainState, result: StepResult, iteration_time: float) -> None:
        """Record one iteration: every `log_interval` iterations, and the first, the last and skipped ones."""
        if not self._active:
            return
        self._window.append((iteration_time, result))
        if self._bar is not None:
            self._bar.update()
        iteration = state.iteration
        for name, image in result.images.items():
            self.log_image(iteration, name, image)
        if result.skipped:
            self.note(f"iteration {iteration}: the optimizer step is skipped: {result.skipped}")
        elif iteration % self._interval and iteration not in (1, self._train_iters):
            return
        row = {"iteration": iteration, "consumed_samples": state.consumed_samples} | result.metrics | self._speed()
        if result.skipped:
            row["skipped"] = result.skipped
        self._window.clear()
        self._write(row, prefix="train")
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{result.metrics['loss']:.4f}")
        else:
            self._print_line(row)

    def log_validation(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Write a validation as a line of its own, with names prefixed by `validation_`."""
        if not self._active:
            return
        named = {f"validation_{name}": value for name, value in metrics.items()}
        self._write(
            {"iteration": state.iteration, "consumed_samples": state.consumed_samples} | named,
            prefix="valid",
        )
        self._say(f"iteration {state.iteration} | " + " | ".join(f"{k} {v:.4f}" for k, v in named.items()))

    def log_image(self, iteration: int, name: str, image: Tensor) -> None:
        """Show an image uint8 [h, w, 3] in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image, iteration, dataformats="HWC")

    def note(self, text: str) -> None:
        """Print one line for the user on rank 0."""
        if self._active:
            self._say(text)

    def close(self) -> None:
        """Flush and close all logs."""
        for sink in (self._bar, self._file, self._tensorboard):
            if sink is not None:
                sink.close()

    def _speed(self) -> dict[str, float | None]:
        count = len(self._window)
        seconds = sum(elapsed for elapsed, _ in self._window)
        flops = sum(result.flops for _, result in self._window)
        tflops = flops / seconds / self._world_size / 1e12
        return {
            "iteration_time": seconds / count,
            "tokens_per_second": sum(result.num_tokens for _, result in self._window) / seconds,
            "model_tflops": tflops,
            "mfu": tflops / self._peak_tflops if self._peak_tflops else None,
            "data_wait": sum(result.data_wait for _, result in self._window) / count,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _write(self, row: dict[str, Any], prefix: str) -> None:
        if self._file is None:
            return
        # JSON has no NaN: null stands for a value that is not a number.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "iteration" and isinstance(value, int | float):
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, row["iteration"])

    def _print_line(self, row: dict[str, Any]) -> None:
        done = row["iteration"] - self._first
        seconds_left = (time.perf_counter() - self._started) / done * (self._train_iters - row["iteration"])
        shown = " | ".join(f"{k} {row[k]:.4g}" for k in ("loss", "grad_norm", "learning_rate") if k in row)
        speed = f"{row['iteration_time']:.3f} s/it"
        if row["tokens_per_second"]:
            speed += f" | {row['tokens_per_second']:.0f} tokens/s"
        if row["mfu"] is not None:
            speed += f" | MFU {100 * row['mfu']:.1f} %"
        self._say(f"iteration {row['iteration']}/{self._train_iters} | {shown} | {speed} | {seconds_left:.0f} s left")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


def truncate_metrics(path: Path, resume_iteration: int) -> int:
    """Move the lines after `resume_iteration` to metrics_dropped.jsonl; all lines when the run starts anew.

    Returns:
        the number of lines that were moved. An incomplete last line is dropped.
    """
    if not path.exists():
        return 0
    lines = [line.text for line in read_lines(path) if line.text]
    kept = [line for line in lines if _is_before(line, resume_iteration)]
    moved = [line for line in lines if _is_whole(line) and not _is_before(line, resume_iteration)]
    if moved:
        with path.with_name(DROPPED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in moved)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return len(moved)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a metrics.jsonl."""
    return [row for _, row in read_jsonl(path)]


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: on the accelerator, or resident memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_before(line: str, resume_iteration: int) -> bool:
    return _is_whole(line) and 0 < resume_iteration and json.loads(line)["iteration"] <= resume_iteration


def _is_whole(line: str) -> bool:
    """Whether this is a whole row of metrics; a process that is killed while it writes leaves an incomplete one."""
    try:
        return isinstance(json.loads(line)["iteration"], int)
    except (ValueError, KeyError, TypeError):
        return False
