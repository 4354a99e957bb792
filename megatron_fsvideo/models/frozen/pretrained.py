"""Load models of transformers and diffusers from folders that users bring, without running their code.

Only safetensors are read, nothing is downloaded unless asked, and every weight must come from the file: the libraries
fill in missing weights at random and only print a warning.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fsvideo.config import require
from megatron_fsvideo.config.rules import shown


@dataclass(frozen=True)
class PretrainedSource:
    """The place of a model's files.

    Attributes:
        name: what the user called it, for messages.
        place: a folder, or an id of the Hugging Face hub.
        allow_download: whether the hub is asked for what is not on this machine.
    """

    name: str
    place: str
    allow_download: bool = False

    @property
    def path(self) -> str:
        """The folder with `~` resolved, or the id.

        Raises:
            ValueError: it is spelled as a path, and there is no such folder.
        """
        path = Path(self.place).expanduser()
        if path.is_dir():
            return str(path)
        if self.place.startswith((".", "/", "~")) or self.place.count("/") != 1:
            raise ValueError(f"{self.name}: {self.place} is not a folder")
        if not self.allow_download:
            raise ValueError(
                f"{self.name}: {self.place} is not a folder; if it is an id of the Hugging Face hub, give "
                "--allow-download to take it from there"
            )
        return self.place


def load_pretrained(
    loader: type,
    source: PretrainedSource,
    model_types: Sequence[str],
    dtype: torch.dtype,
    other_parts: Sequence[str] = (),
) -> Any:
    """A transformers model, all of whose weights come from its file.

    Args:
        loader: the model's class.
        model_types: the kinds of model that the folder may hold, as its config.json says.
        other_parts: beginnings of the names of weights that belong to parts of the file's model that are not used.

    Raises:
        ValueError: no such folder, another kind of model, no safetensors, or weights that are missing, unexpected or of
            another shape; the message names up to three.
    """
    path = source.path
    _check_kind(source, path, model_types)
    try:
        with _quiet():
            model, info = loader.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=not source.allow_download,
            )
    except ImportError:
        raise
    # Values of the folder's config.json reach all of the library's code, which raises whatever it meets.
    except Exception as error:
        raise _refusal(source, error) from error
    check_loading_info(source.name, info, other_parts)
    return model


def load_tokenizer(loader: type, source: PretrainedSource) -> Any:
    """The tokenizer of a transformers model.

    Raises:
        ValueError: no such folder, or no tokenizer in it that runs without code of its own.
    """
    path = source.path
    try:
        return loader.from_pretrained(path, trust_remote_code=False, local_files_only=not source.allow_download)
    except ImportError:
        raise
    except Exception as error:  # as above
        raise _refusal(source, error) from error


def check_loading_info(name: str, info: dict[str, Any], other_parts: Sequence[str] = ()) -> None:
    """Refuse a model some of whose weights are not its file's.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` of transformers or diffusers returned.

    Raises:
        ValueError: naming up to three weights.
    """
    wrong = [f"{key} is missing" for key in sorted(map(str, info["missing_keys"]))]
    wrong += [f"{entry} has another shape" for entry in sorted(map(str, info["mismatched_keys"]))]
    unexpected = sorted(map(str, info["unexpected_keys"]))
    wrong += [f"{key} is unexpected" for key in unexpected if not key.startswith(tuple(other_parts))]
    wrong += list(map(str, info.get("error_msgs", ())))
    if wrong:
        raise ValueError(f"{name}: does not fit the model in {len(wrong)} weights: {'; '.join(wrong[:3])}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's progress bar and table of weights. `check_loading_info` reports them in one line."""
    words = require("transformers.utils.logging", "encoders")
    level, shows_bars = words.get_verbosity(), words.is_progress_bar_enabled()
    words.set_verbosity_error()
    words.disable_progress_bar()
    try:
        yield
    finally:
        words.set_verbosity(level)
        if shows_bars:
            words.enable_progress_bar()


def _check_kind(source: PretrainedSource, path: str, model_types: Sequence[str]) -> None:
    config = Path(path) / "config.json"
    if not config.is_file():
        # On the hub, or missing, which the library says.
        return
    try:
        values = json.loads(config.read_text(encoding="utf-8-sig"))
        kind = values.get("model_type") if isinstance(values, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source.name}: {config} cannot be read: {error}") from error
    if kind not in model_types:
        raise ValueError(f"{source.name}: {config} says model_type {shown(kind)}, expected {' or '.join(model_types)}")


def _refusal(source: PretrainedSource, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "safetensors" in reason or "model.safetensors" in reason:
        reason += " (only safetensors are read; AutoModel.from_pretrained(...).save_pretrained(...) writes them)"
    return ValueError(f"{source.name}: {reason}")
