"""The summary that a run prints before its first iteration."""

from megatron_fsvideo.checkpoint.starting_point import StartingPoint
from megatron_fsvideo.config import CheckpointConfig, TrainingConfig
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.training.state import TrainState
from megatron_fsvideo.training.task import Task


def start_summary(
    task: Task,
    state: TrainState,
    start: StartingPoint,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    pgs: ProcessGroups,
) -> list[str]:
    """Lines about networks, layout, data, starting point and --save folder. Every rank calls this."""
    lines = []
    for name, network in task.networks.items():
        total, trained = network.count_parameters()
        part = "" if trained == total else f", {trained:,} of them trained"
        kind, rate = network.settings.optimizer, network.settings.lr
        lines.append(f"{name}: {total:,} parameters{part}; {kind}, lr {rate:g}, {'bf16' if training.bf16 else 'fp32'}")
    lines += [_layout(pgs), *task.summary(), _origin(start, state)]
    lines.append(f"iterations {state.iteration + 1:,} to {training.train_iters:,}; {_saving(checkpoint)}")
    return lines


def _layout(pgs: ProcessGroups) -> str:
    sizes = {"tensor": pgs.tp_size, "context": pgs.cp_size, "pipeline": pgs.pp_size, "data": pgs.dp_size}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    count = f"{pgs.world_size} process" + ("es" if pgs.world_size > 1 else "")
    return f"layout: {count} on {pgs.device.type}" + (f": {', '.join(parts)} parallel" if parts else "")


def _origin(start: StartingPoint, state: TrainState) -> str:
    if start.folder is None:
        return "begins with random weights"
    if start.is_initial:
        return f"begins with the weights of {start.folder} (--init-from)"
    if start.purpose == "finetune":
        return f"begins with the weights of {start.folder} (--finetune)"
    if start.purpose == "stage":
        return f"begins a new stage from iteration {state.iteration:,} of {start.folder}"
    return f"continues {start.folder} after iteration {state.iteration:,}"


def _saving(checkpoint: CheckpointConfig) -> str:
    if checkpoint.save is None:
        return "nothing is saved (no --save)"
    interval = f"every {checkpoint.save_interval:,} iterations and " if checkpoint.save_interval else ""
    kept = f", the newest {checkpoint.keep_checkpoints} are kept" if checkpoint.keep_checkpoints else ""
    return f"saves to {checkpoint.save} {interval}at the end{kept}"
