"""Optional libraries are imported here, lazily, so that the error names the extra that brings them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library.

    Raises:
        ImportError: the library is missing; the message names the extra (or the package) to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed ({error}); install it with: pip install 'megatron_fsvideo[{extra}]'"
        ) from error
