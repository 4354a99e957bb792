"""Whether a run may continue from a checkpoint: same architecture, same autoencoder, same kind of optimizer."""

from typing import Any

from megatron_fsvideo.config import DiTJob, differences, from_dict
from megatron_fsvideo.models.codecs import is_same_encoder, spell_autoencoder

# Fields that say how weights start: they have started.
_INITIAL_VALUES = ("layer_memory_init:", "q_norm_init:")


def check_agreement(
    record: dict[str, Any],
    job: DiTJob,
    description: dict[str, Any],
    where: str,
    *,
    finetune: bool,
    new_stage: bool = False,
) -> None:
    """Compare a checkpoint's job.json with this run.

    Args:
        description: of this run's dataset, from `LatentDataset.description`.
        where: the checkpoint's folder, for the message.
        finetune: only the weights are wanted.
        new_stage: everything but the position in the data is wanted.

    Raises:
        ValueError: naming every field that differs.
    """
    if record.get("weights_only", False) and not finetune:
        raise ValueError(f"the checkpoint {where} holds weights alone and no optimizer's state: add --finetune")
    saved = from_dict(DiTJob, record["job"])
    wrong = [line for line in differences(saved.model, job.model) if not line.startswith(_INITIAL_VALUES)]
    wrong += _only(differences(saved.diffusion, job.diffusion), ("prediction_type",))
    if wrong:
        raise ValueError(f"the checkpoint {where} has another architecture: {'; '.join(wrong)}")
    if record["data"] is not None:  # weights that were converted from another model belong to no latents yet
        check_autoencoder(record["data"], description, where)
    if finetune:
        return
    kind = _only(differences(saved.optimizer, job.optimizer), ("optimizer",))
    if kind:
        raise ValueError(
            f"the optimizer state in {where} does not fit: {'; '.join(kind)}; finetune loads the weights alone"
        )
    _check_encoders(record["data"], description, where)
    if new_stage:
        if record["iteration"] >= job.training.train_iters:
            raise ValueError(
                f"train_iters {job.training.train_iters} leaves the new stage no iteration: {where} has done "
                f"{record['iteration']}, which train_iters counts too"
            )
        return
    _check_streams(record["data"], description, where)


def _check_encoders(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    for kind in ("text_encoder", "image_encoder"):
        if saved[kind] != current[kind]:
            raise ValueError(
                f"the checkpoint {where} was trained with {kind} {saved[kind]}, the dataset was made with "
                f"{current[kind]}: encode it with the same, or load the weights alone with --finetune"
            )


def _check_streams(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """A position in the data means nothing in other data. (Older checkpoints do not say what theirs was.)"""
    ours, theirs = current["streams"], saved.get("streams", current["streams"])
    if ours != theirs:
        raise ValueError(
            f"the checkpoint {where} was trained on {_spell(theirs)}, this run's data is {_spell(ours)}: a position in "
            "the one is none in the other; to go on with other data, load it with --new-stage (keeps the optimizer's "
            "state) or --finetune (weights alone) and save into another folder"
        )


def _spell(streams: list[list[Any]]) -> str:
    return " + ".join(f"{number} samples of {bucket} (weight {share})" for bucket, number, share in streams)


def check_autoencoder(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuse latents of another autoencoder than the one the weights were trained on.

    Raises:
        ValueError: naming both.
    """
    ours, theirs = current["autoencoder"], saved["autoencoder"]
    if not is_same_encoder(ours, theirs):
        raise ValueError(
            f"the checkpoint {where} was trained on latents of the autoencoder {spell_autoencoder(theirs)}, the "
            f"dataset was made by {spell_autoencoder(ours)}: encode the videos again with the checkpoint's "
            "autoencoder, or train from the start"
        )


def _only(lines: list[str], names: tuple[str, ...]) -> list[str]:
    return [line for line in lines if line.split(":")[0] in names]
