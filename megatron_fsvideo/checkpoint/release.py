"""Release folders: `config.json` + `model.safetensors`, which cannot run code; saves and loads autoencoders.

A release holds the weights of a training run for other uses: publication, encoding a collection, generation. A folder
appears whole or not at all.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.checksums import CHECKSUM_FILE, check_files
from megatron_fsvideo.checkpoint.safetensors_shards import TensorInfo, write_shards
from megatron_fsvideo.checkpoint.save_folder import describe_folder, iteration_folder, latest_iteration
from megatron_fsvideo.config import FSAEConfig, from_dict, to_dict
from megatron_fsvideo.config.rules import shown
from megatron_fsvideo.data.outputs import OutputError, try_output, write_json
from megatron_fsvideo.data.text_files import TextError, read_object
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.tiling import Tiling

CONFIG_FILE = "config.json"
RELEASE_BASENAME = "model"
WEIGHTS_FILE = f"{RELEASE_BASENAME}.safetensors"
ONE_FILE = 1 << 62
"""Size of shards that makes one of all weights."""
FSAE_FORMAT = "megatron_fsvideo.fsae"
MODEL_FOLDER = "model"


def save_release(
    folder: str | Path, config: dict[str, Any], weights: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a release folder; an older one at the same place is replaced once the new one is complete.

    Args:
        config: JSON-able description from which the model is built.
        weights: name -> tensor.
        metadata: strings stored in the safetensors header.

    Raises:
        OutputError: the path holds something that is not a release, or cannot be written.
    """
    target = Path(folder)
    check_release_folder(target, overwrite=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    # safetensors.torch.save_file would ignore the umask: only the owner could read its files.
    write_shards(unfinished, RELEASE_BASENAME, infos, lambda name: weights[name].detach().cpu(), ONE_FILE, metadata)
    write_json(unfinished / CONFIG_FILE, config)
    if target.exists():
        replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(replaced)
        unfinished.rename(target)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(target)


def check_release_folder(folder: str | Path, *, overwrite: bool) -> None:
    """Refuse a path for a release that is occupied or cannot be written.

    Args:
        overwrite: whether an existing release may be replaced. Other folders and files are never replaced.

    Raises:
        OutputError: the message says what occupies the path, or why it cannot be written.
    """
    target = Path(folder)
    is_release = all((target / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_release and not is_empty:
        raise OutputError(f"{folder}: is there already and is no release folder; choose another place")
    if is_release and not overwrite:
        raise OutputError(f"{folder}: holds a release; choose another place, or give --overwrite to replace it")
    try_output(target)


def load_release(folder: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config and the weights of a release folder.

    Raises:
        ValueError: a file is missing or damaged.
    """
    root = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (root / name).is_file():
            raise ValueError(f"{folder} is no release: it {_describe_missing(root, name)}")
    if (root.parent / CHECKSUM_FILE).is_file():  # checksums of the checkpoint that contains the release
        check_files(root.parent, under=root.name)
    try:
        config = read_object(root / CONFIG_FILE)
        # The library reports a file without read permission as "No such file".
        with (root / WEIGHTS_FILE).open("rb"):
            pass
        return config, safetensors.torch.load_file(root / WEIGHTS_FILE, device=str(device))
    except OSError as error:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} cannot be read: {error.strerror or error}") from error
    except (TextError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error


def _describe_missing(folder: Path, name: str) -> str:
    if folder.is_dir() and not any(folder.iterdir()):
        return "is empty"
    found = describe_folder(folder)
    return found if found != "holds no checkpoint" else f"has no {name}"


def save_fsae(folder: str | Path, fsae: FSAE, weights: dict[str, Tensor] | None = None) -> None:
    """Write an autoencoder as a release folder, with its own weights or with given weights of the same names."""
    config = {"format": FSAE_FORMAT, "model": to_dict(fsae.config)}
    save_release(folder, config, fsae.state_dict() if weights is None else weights, {"format": FSAE_FORMAT})


def load_fsae(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> FSAE:
    """Load an autoencoder for use (evaluation mode, no gradients).

    Args:
        path: a release folder, or the --save folder of pretrain_fsae.py, whose latest checkpoint is taken.

    Raises:
        ValueError: the folder holds no autoencoder, or its weights do not fit its config; the message names them.
    """
    folder = resolve_release(path)
    config, weights = load_release(folder, device)
    if config.get("format") != FSAE_FORMAT:
        raise ValueError(f"{folder} holds {shown(config.get('format'))}, not an autoencoder ({FSAE_FORMAT!r})")
    model_config = from_dict(FSAEConfig, config.get("model"), f"{folder / CONFIG_FILE}: model")
    try:
        with torch.device("meta"):
            fsae = FSAE(model_config)
    except (ValueError, RuntimeError, OverflowError) as error:  # torch refuses sizes whose product overflows
        raise ValueError(f"{folder / CONFIG_FILE}: {str(error).splitlines()[0]}") from error
    check_weights(str(folder), fsae, weights)
    fsae.load_state_dict(weights, assign=True)
    return fsae.to(device, dtype).eval().requires_grad_(False)


def load_codec(path: str | Path, tiling: Tiling | None = None) -> FSAECodec:
    """Load an autoencoder as a codec, in fp32 on the CPU: its identity is that of the stored weights.

    Raises:
        ValueError: `load_fsae` refuses the folder.
    """
    return FSAECodec(load_fsae(path), tiling=tiling)


def resolve_release(path: str | Path) -> Path:
    """Find the release folder of `path`: the path itself, or the model folder of its latest checkpoint.

    Raises:
        ValueError: the path is a --save folder that names no latest checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / CONFIG_FILE).is_file():
        return folder
    iteration = latest_iteration(folder)
    return folder if iteration is None else iteration_folder(folder, iteration) / MODEL_FOLDER


def check_weights(source: str, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Refuse weights of another architecture.

    Raises:
        ValueError: the message names up to three weights that are missing, unexpected or of another shape.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: file {found.get(name, 'missing')}, model {expected.get(name, 'none')}"
        for name in sorted(set(expected) | set(found))
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(f"{source} does not fit the model in {len(wrong)} weights: {'; '.join(wrong[:3])}")
