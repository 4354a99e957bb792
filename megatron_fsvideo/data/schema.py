"""Check values that come from files against a type: one line with file, field, value and what was expected."""

import re
from typing import Any, TypeVar

import msgspec

from megatron_fsvideo.data.text_files import TextError, printable

ValueT = TypeVar("ValueT")
_SHOWN = 60


def checked(where: str, kind: type[ValueT], value: Any, *, from_strings: bool = False) -> ValueT:
    """A value as an instance of `kind`: a dataclass, a msgspec struct or a plain type.

    Args:
        where: the file, and the line if it has some.
        from_strings: numbers may be spelled as text, as in CSV.

    Raises:
        TextError: a field is missing, unknown, of another type or out of range.
    """
    try:
        return msgspec.convert(value, kind, strict=not from_strings)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `")
        path = place.rstrip("`").removeprefix("$").removeprefix(".")
        shown = _shown(_at(value, path))
        field = f"{path} is {shown}: " if path else ""
        raise TextError(printable(f"{where}: {field}{reason[0].lower()}{reason[1:]}")) from None
    except RecursionError:
        raise TextError(f"{where}: is nested too deeply to be read") from None


def _at(value: Any, path: str) -> Any:
    """The value that msgspec's path names, as far as the path can be followed."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            break
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
