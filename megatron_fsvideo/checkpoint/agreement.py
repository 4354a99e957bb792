"""Checks whether a run may continue from a checkpoint: networks, data and kind of optimizer must be the same."""

from collections.abc import Mapping
from typing import Any, Literal

from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord
from megatron_fsvideo.config.rules import shown
from megatron_fsvideo.data.sample_order import check_order
from megatron_fsvideo.models.codecs import is_same_encoder, spell_autoencoder

# resume takes everything, stage all but the position in the data, finetune only the weights.
Purpose = Literal["resume", "stage", "finetune"]

# Fields for initial values of weights, which do not matter once weights are loaded.
_INITIAL_VALUES = ("layer_memory_init", "q_norm_init", "residual_init", "resample_init", "patchify_init")
_ABSENT = "none"
_NO_OPTIMIZER = {"optimizer": _ABSENT}


def check_agreement(
    saved: RunRecord, networks: Mapping[str, dict[str, Any]], run: RunDescription, where: str, purpose: Purpose
) -> None:
    """Compare a checkpoint with this run.

    Args:
        networks: name -> record of each network of this run.
        where: folder of the checkpoint, for the message.

    Raises:
        ValueError: a field differs; the message names every such field and the remedy.
    """
    if purpose != "finetune":
        _check_continues(saved, networks, where)
    for name in sorted(set(saved.networks) & set(networks)):
        _check_network(name, saved.networks[name], networks[name], where, purpose)
    if saved.run.data is not None and run.data is not None:
        check_autoencoder(saved.run.data, run.data, where)
    if purpose == "finetune":
        return
    _check_equal(saved.run.fixed, run.fixed, where)
    _check_frozen(saved.run.frozen, run.frozen, where)
    if saved.run.data is not None and run.data is not None:
        _check_encoders(saved.run.data, run.data, where)
        if purpose == "resume":
            _check_streams(saved.run.data, run.data, where)
    if purpose == "resume" and saved.run.order is not None and run.order is not None:
        remedy = "load it with --new-stage (keeps the optimizer's state) or --finetune, and save into another folder"
        check_order(saved.run.order, run.order, where, remedy)


def _check_continues(saved: RunRecord, networks: Mapping[str, Any], where: str) -> None:
    if saved.weights_only:
        raise ValueError(f"the checkpoint {where} holds weights alone and no optimizer's state: add --finetune")
    if saved.is_old:
        raise ValueError(
            f"the checkpoint {where} was written by an earlier version of this program, whose optimizer state cannot "
            "be continued: load its weights and their average with --finetune, into a --save folder of its own"
        )
    if set(saved.networks) != set(networks):
        raise ValueError(
            f"the checkpoint {where} is of a run that trains {_list(saved.networks)}, this run trains "
            f"{_list(networks)}: train the same networks, or start from it with --finetune or --init-from"
        )


def _check_network(name: str, saved: dict[str, Any], current: dict[str, Any], where: str, purpose: Purpose) -> None:
    if saved["kind"] != current["kind"]:
        raise ValueError(f"the checkpoint {where} has a network {name} of kind {saved['kind']}, not {current['kind']}")
    # A field that only one of the two records has counts as its default in the other.
    wrong = [line for line in _differences(saved["model"], current["model"]) if not line.startswith(_INITIAL_VALUES)]
    diffusion = _differences(saved.get("diffusion") or {}, current.get("diffusion") or {})
    wrong += [line for line in diffusion if line.startswith("prediction_type:")]
    if wrong:
        raise ValueError(f"the checkpoint {where} has another architecture: {'; '.join(wrong)}")
    if purpose != "finetune" and (kind := _differences(saved.get("optimizer", _NO_OPTIMIZER), current["optimizer"])):
        raise ValueError(
            f"the optimizer state in {where} does not fit: {'; '.join(kind)}; finetune loads the weights alone"
        )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Lines `field: saved value, current value`. Values may have been through JSON: tuples are lists there."""
    pairs = [(name, _plain(saved[name]), _plain(current[name])) for name in saved if name in current]
    return [f"{name}: checkpoint {shown(old)}, this run {shown(new)}" for name, old, new in pairs if old != new]


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, tuple | list) else value


def _check_equal(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    if wrong := _differences(saved, current):
        raise ValueError(
            f"the checkpoint {where} cannot be continued with another {'; '.join(wrong)}: give this run a --load and "
            "--save folder of its own, and the other as --init-from"
        )


def _check_frozen(saved: Mapping[str, dict[str, str]], current: Mapping[str, dict[str, str]], where: str) -> None:
    for name in sorted(set(saved) | set(current)):
        theirs, ours = (found.get(name, {}).get("fingerprint", _ABSENT) for found in (saved, current))
        if theirs != ours:
            path = current.get(name, saved.get(name))["path"]
            raise ValueError(
                f"the checkpoint {where} was trained with the frozen network {name} {theirs[:12]}, this run's is "
                f"{ours[:12]} ({path}): give the same weights, or load the trained ones alone with --finetune"
            )


def _check_encoders(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    for kind in ("text_encoder", "image_encoder"):
        if saved[kind] != current[kind]:
            raise ValueError(
                f"the checkpoint {where} was trained with {kind} {saved[kind]}, the dataset was made with "
                f"{current[kind]}: encode it with the same, or load the weights alone with --finetune"
            )


def _check_streams(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuse other data: a position in one dataset has no meaning in another. (Older checkpoints do not name data.)"""
    ours, theirs = current["streams"], saved.get("streams", current["streams"])
    if ours != theirs:
        raise ValueError(
            f"the checkpoint {where} was trained on {_spell(theirs)}, this run's data is {_spell(ours)}: a position in "
            "one dataset has no meaning in another; to go on with other data, load it with --new-stage (keeps the "
            "optimizer's state) or --finetune (weights alone) and save into another folder"
        )


def _spell(streams: list[list[Any]]) -> str:
    return " + ".join(f"{number} samples of {bucket} (weight {share})" for bucket, number, share in streams)


def check_autoencoder(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuse latents of another autoencoder than the one the weights were trained on.

    Raises:
        ValueError: the autoencoders differ; the message names both.
    """
    ours, theirs = current["autoencoder"], saved["autoencoder"]
    if not is_same_encoder(ours, theirs):
        raise ValueError(
            f"the checkpoint {where} was trained on latents of the autoencoder {spell_autoencoder(theirs)}, the "
            f"dataset was made by {spell_autoencoder(ours)}: encode the videos again with the checkpoint's "
            "autoencoder, or train from the start"
        )


def _list(networks: Mapping[str, Any]) -> str:
    return " and ".join(sorted(networks)) or "nothing"
