"""Rules for values from outside: the type, the range and the length are written in the field of a dataclass.

    @dataclass(frozen=True)
    class Request(Checked):
        prompt: str
        seed: Count = 0

    Request("a dog", seed=-1)       # ValueError: seed must be an integer of at least 0, got -1
    from_dict(Request, parse_json(line, "requests.jsonl line 3"), "requests.jsonl line 3")
                                    # ValueError: requests.jsonl line 3: seed must be an integer of at least 0, got -1

One function, `check_fields`, serves flags, presets, job.json, manifests and every other record: a `Checked` dataclass
calls it whenever an object is made. Numbers must be finite everywhere. Ranges are msgspec's `Meta`.
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]
# Limit of layers or blocks: a larger number would build a network for hours before a check could refuse it.
Depth = Annotated[int, Meta(ge=0, le=1000)]
Layers = Annotated[int, Meta(ge=1, le=1000)]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
PathText = Annotated[str, Meta(min_length=1)]

_LARGEST_INT = 2**63 - 1
_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_BOUNDS = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}


class FieldError(ValueError):
    """A value that its field does not allow.

    Attributes:
        name: the field.
        problem: the allowed values, and the given value; the message is `name problem`.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem

    def prefixed(self, prefix: str) -> "FieldError":
        """Return this error for the field `prefix` + name."""
        return FieldError(prefix + self.name, self.problem)


class Checked:
    """Base of dataclasses whose fields are checked when an object is made.

    A subclass with rules of its own across fields calls `super().__post_init__()` before them.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(record: Any) -> None:
    """Check every field of a dataclass object against its annotation, and convert lists to tuples, integers to floats.

    Fields that are dataclasses themselves have been checked when they were made.

    Raises:
        FieldError: a value has another type, is out of range or not finite, or is a text that no file name can have.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise FieldError(name, f"must be a {hint.__name__}, got {shown(value)}")
            continue
        # A frozen dataclass has no other way to set a field while it is made.
        object.__setattr__(record, name, _converted(name, value, hint))


def from_dict(cls: type[T], values: Any, source: str = "") -> T:
    """Make a dataclass object, with nested ones, from JSON values.

    Args:
        source: the file, and the line where it has several, for messages.

    Raises:
        ValueError: the values are no mapping, or a field is unknown, missing, or refused by its rules.
    """
    where = f"{source}: " if source else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}{cls.__name__} must be an object with fields, got {shown(values)}")
    hints = _hints(cls)
    if unknown := sorted(str(name) for name in set(values) - set(hints)):
        raise ValueError(
            f"{where}{cls.__name__} has no field {', '.join(map(shown, unknown[:5]))}: "
            "written by another version of this code?"
        )
    required = [field.name for field in dataclasses.fields(cls) if has_no_default(field)]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}{cls.__name__} lacks the field {', '.join(missing)}")
    made = {}
    for name, value in values.items():
        is_record = dataclasses.is_dataclass(hints[name])
        made[name] = from_dict(hints[name], value, f"{where}{name}") if is_record else value
    try:
        return cls(**made)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def to_dict(record: Any) -> dict[str, Any]:
    """Convert a dataclass object, with nested ones, to JSON values."""
    return dataclasses.asdict(record)


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a JSON text. NaN, infinities and nesting beyond the interpreter's recursion limit are refused.

    Raises:
        ValueError: the text is no such JSON; the message names `source`.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source} is not valid here: its JSON is nested too deeply") from None


def has_no_default(field: dataclasses.Field) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def allowed(hint: Any) -> str:
    """Describe the values that a field type allows: "an integer of at least 1", "one of adam, muon"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([allowed(arguments[0]), *_bounds(arguments[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if part is types.NoneType else allowed(part) for part in arguments)
    if origin is tuple:
        words = [allowed(element) for element in arguments if element is not Ellipsis]
        if Ellipsis in arguments:
            return f"a list of values, each {words[0]}"
        each = f"each {words[0]}" if len(set(words)) == 1 else f"first {', then '.join(words)}"
        return f"{len(words)} values, {each}"
    return _NOUNS.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """Show a value in a message, in one short line however deep or long the value is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _bounds(metas: tuple[Any, ...]) -> list[str]:
    words = []
    for meta in metas:
        numbers = {name: getattr(meta, name) for name in _BOUNDS}
        words += [_BOUNDS[name].format(number) for name, number in numbers.items() if number is not None]
        if meta.min_length:
            words.append("that is not empty")
    return [" and ".join(words)] if words else []


def _converted(name: str, value: Any, hint: Any) -> Any:
    try:
        value = msgspec.convert(value, hint)
    except (msgspec.MsgspecError, RecursionError):
        problem = _unusable(value) or f"must be {allowed(hint)}"
        raise FieldError(name, f"{problem}, got {shown(value)}") from None
    for part in value if isinstance(value, tuple) else (value,):
        if problem := _unusable(part):
            raise FieldError(name, f"{problem}, got {shown(value)}")
    return value


def _unusable(value: Any) -> str | None:
    """The fault of a number or a text that no field allows; None if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return "must be an integer of at most 64 bits"
    if isinstance(value, str):
        if "\0" in value:
            return "must be text without a null character"
        try:
            value.encode("utf-8", "surrogateescape")  # Python's form of file names that are not UTF-8
        except UnicodeEncodeError:
            return "must be text without half a surrogate pair"
    return None
