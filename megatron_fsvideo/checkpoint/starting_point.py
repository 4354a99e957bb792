"""The rule, for every job, that decides where a run begins or continues.

| --save holds a checkpoint | --load | the run |
|---|---|---|
| yes | not given, or only --init-from | is refused: it would overwrite another run |
| yes | any folder | continues from --save: it was stopped, and the same command was started again |
| no | a --save folder with a checkpoint | continues from it; --finetune and --new-stage say what is taken |
| no | a release | with --finetune takes its weights |
| no | the --save folder, still empty | begins: from --init-from, or anew |
| no | anything else | is refused |
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_fsvideo.checkpoint.agreement import Purpose
from megatron_fsvideo.checkpoint.save_folder import describe_folder, latest_iteration
from megatron_fsvideo.config import CheckpointConfig


@dataclass(frozen=True)
class StartingPoint:
    """The folder that a run begins with, and its role.

    Attributes:
        folder: folder to load from; None begins with initial weights.
        purpose: which parts of the folder's content are taken.
        is_own: the folder is this run's --save folder.
        is_initial: the folder is that of --init-from, from which the task takes what its networks need.
    """

    folder: Path | None = None
    purpose: Purpose = "resume"
    is_own: bool = False
    is_initial: bool = False


def find_starting_point(config: CheckpointConfig, new_stage: bool) -> StartingPoint:
    """Decide from the flags and from what is in the folders. Paths are compared resolved.

    Raises:
        ValueError: the flags contradict each other or the folders; the message says what to change.
    """
    save, load = (Path(path) if path is not None else None for path in (config.save, config.load))
    is_same = save is not None and load is not None and save.resolve() == load.resolve()
    has_saved = save is not None and latest_iteration(save) is not None
    wanted = {"--finetune": config.finetune, "--new-stage": new_stage}
    asked = next((flag for flag, is_set in wanted.items() if is_set), None)
    if config.init_from is not None and (asked or (load is not None and not is_same)):
        other = asked or f"--load {load}"
        raise ValueError(f"--init-from {config.init_from} and {other} both say where the weights come from: give one")
    if load is None:
        if asked:
            raise ValueError(f"{asked} begins with an earlier run's state: give its --save folder as --load")
        if has_saved:
            raise ValueError(
                f"--save {save} holds a checkpoint, which this run would overwrite: add --load {save} to continue it, "
                "or save into another folder"
            )
        return _initial(config)
    if is_same and asked:
        raise ValueError(
            f"{asked} begins a run of its own from --load {load}: give it a --save folder of its own, or leave {asked} "
            "out to continue"
        )
    if has_saved:
        return StartingPoint(save, is_own=True)
    if is_same:
        return _initial(config)
    return _foreign(load, "finetune" if config.finetune else "stage" if new_stage else "resume")


def is_release(folder: Path) -> bool:
    """Whether a folder has a config and weights in safetensors."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))


def _initial(config: CheckpointConfig) -> StartingPoint:
    if config.init_from is None:
        return StartingPoint()
    return StartingPoint(Path(config.init_from), "finetune", is_initial=True)


def _foreign(load: Path, purpose: Purpose) -> StartingPoint:
    if latest_iteration(load) is not None:
        return StartingPoint(load, purpose)
    if is_release(load):
        if purpose == "finetune":
            return StartingPoint(load, purpose)
        raise ValueError(f"--load {load} is a release, which has weights alone: add --finetune to begin with them")
    raise ValueError(
        f"--load {load} {describe_folder(load)}: name the --save folder of an earlier run (only the --save folder may "
        "be empty)"
    )
