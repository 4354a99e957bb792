"""`--profile`: a few iterations recorded with torch's profiler, and the CUDA allocator's history.

Per rank, below `--tensorboard-dir` or else `--save`:

    profile/rank0_iterations_11_12.pt.trace.json.gz    for ui.perfetto.dev, chrome://tracing or TensorBoard's plugin
    profile/rank0_iterations_11_12.txt                 operations, by their own time without that of callees
    profile/rank0_iterations_11_12.memory.pickle       for pytorch.org/memory_viz (--record-memory-history)
"""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_fsvideo.config import CheckpointConfig, LoggingConfig, ProfilingConfig

MEMORY_HISTORY_EVENTS = 1_000_000


class IterationProfiler:
    """Records iterations `profile_step_start` + 1 to `profile_step_end`, counted from 1 over the whole run.

    A run that resumes within this range records the rest of it. If the run ends earlier, the context's exit writes the
    iterations recorded so far.

    Args:
        folder: output folder; None only if nothing is recorded.

    Raises:
        ValueError: there is no folder, or `record_memory_history` is set without a CUDA device.
    """

    def __init__(self, profiling: ProfilingConfig, folder: Path | None = None, rank: int = 0) -> None:
        self._profiling = profiling
        self._folder = folder
        self._rank = rank
        self._profile: profile | None = None
        self._first = self._last = 0  # range of recorded iterations; the first is 0 while nothing is recorded
        wanted = profiling.profile or profiling.record_memory_history
        if wanted and folder is None:
            raise ValueError("--profile and --record-memory-history write below --tensorboard-dir or --save: give one")
        if profiling.record_memory_history and not torch.cuda.is_available():
            raise ValueError(
                "--record-memory-history records CUDA's allocator, and there is no CUDA device; --profile alone "
                "records allocations on a CPU too"
            )
        self._is_wanted = wanted and rank in profiling.profile_ranks

    def begin(self, iteration: int) -> None:
        """Start recording if the next iteration is the first to record."""
        settings = self._profiling
        is_due = settings.profile_step_start < iteration <= settings.profile_step_end
        if not self._is_wanted or self._first or not is_due:
            return
        self._first = iteration
        if settings.record_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_HISTORY_EVENTS)
        if settings.profile:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def end(self, iteration: int) -> None:
        """Stop recording and write if this iteration was the last to record."""
        if self._first:
            self._last = iteration
            if iteration >= self._profiling.profile_step_end:
                self._write()

    def __enter__(self) -> "IterationProfiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._first:
            self._write()

    def _write(self) -> None:
        folder = self._folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self._rank}_iterations_{self._first}_{max(self._first, self._last)}"
        self._first = 0
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(folder / f"{name}.pt.trace.json.gz"))
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self._profile.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=70)
            (folder / f"{name}.txt").write_text(table, encoding="utf-8")
            self._profile = None
        if self._profiling.record_memory_history:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


NO_PROFILE = IterationProfiler(ProfilingConfig())


def profile_folder(logging: LoggingConfig, checkpoint: CheckpointConfig) -> Path | None:
    """Folder below which profiles are written."""
    folder = logging.tensorboard_dir or checkpoint.save
    return Path(folder) if folder else None
