"""Dataclasses as command lines: one field is one flag, its default exists once, the string under it is its help.

A *job* is a frozen dataclass whose fields are frozen dataclasses, the flag groups:

    job = parse_job(DiTJob, DIT_PRESETS, argv)       # default < preset < flag
    from_dict(DiTJob, to_dict(job)) == job           # what is stored as JSON beside every checkpoint

The spelling is Megatron-LM's wherever Megatron-LM has the flag: `tensor_model_parallel_size` is
`--tensor-model-parallel-size`. Unknown and abbreviated flags are errors.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

JobT = TypeVar("JobT")
Presets = Mapping[str, Mapping[str, Any]]


def parse_job(job_class: type[JobT], presets: Presets | None = None, argv: Sequence[str] | None = None) -> JobT:
    """Build a job from a command line. A bad value ends the program with one line that says what is wrong.

    Args:
        job_class: dataclass whose fields are the flag groups.
        presets: preset name -> field name -> value; with presets the parser has `--preset`.
        argv: arguments without the program's name; `sys.argv[1:]` when None.
    """
    parser = make_parser(job_class, presets)
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    values = dict(presets[given.pop("preset")]) if given.get("preset") else {}
    given.pop("preset", None)
    try:
        return build_job(job_class, values | given)
    except ValueError as error:
        parser.error(str(error))


def build_job(job_class: type[JobT], values: Mapping[str, Any]) -> JobT:
    """Deal flat `field name -> value` pairs out to the groups of `job_class`.

    Raises:
        ValueError: a name that no group has, a field without default and value, or a value that a group refuses.
    """
    groups = typing.get_type_hints(job_class)
    owner = _owners(job_class)
    if unknown := sorted(set(values) - set(owner)):
        raise ValueError(f"{job_class.__name__} has no field {', '.join(unknown)}")
    dealt: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for name, value in values.items():
        dealt[owner[name]][name] = value
    for group, cls in groups.items():
        required = [field.name for field in dataclasses.fields(cls) if _has_no_default(field)]
        if missing := [name for name in required if name not in dealt[group]]:
            raise ValueError(" ".join("--" + name.replace("_", "-") for name in missing) + " is required")
    return job_class(**{group: cls(**dealt[group]) for group, cls in groups.items()})


def presets_for(job_class: type, presets: Presets) -> dict[str, dict[str, Any]]:
    """Presets without the values for which this job has no field."""
    owner = _owners(job_class)
    return {name: {key: preset[key] for key in preset if key in owner} for name, preset in presets.items()}


def make_parser(job_class: type, presets: Presets | None = None) -> argparse.ArgumentParser:
    """The argparse parser of a job: one argument group per dataclass. Flags that are not given are absent."""
    parser = _Parser(description=inspect.getdoc(job_class), allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if presets is not None:
        parser.add_argument("--preset", choices=sorted(presets), help="start from these values; flags override them")
    for group_class in typing.get_type_hints(job_class).values():
        title = inspect.getdoc(group_class).split("\n")[0]
        group = parser.add_argument_group(f"{group_class.__name__}: {title}")
        docs = field_docs(group_class)
        hints = typing.get_type_hints(group_class)
        for field in dataclasses.fields(group_class):
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                help=_help(docs[field.name], field),
                **_argument(hints[field.name]),
            )
    return parser


def field_docs(group_class: type) -> dict[str, str]:
    """Field name -> the string literal under it, in the class or in one it inherits from.

    Raises:
        TypeError: a field has no docstring: a flag without a meaning is a defect of ours.
    """
    docs: dict[str, str] = {}
    for ancestor in reversed(group_class.__mro__):
        if dataclasses.is_dataclass(ancestor):
            docs |= _own_field_docs(ancestor)
    missing = [field.name for field in dataclasses.fields(group_class) if field.name not in docs]
    if missing:
        raise TypeError(f"{group_class.__name__}: no docstring under {missing}")
    return docs


def _own_field_docs(group_class: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(group_class))).body[0].body
    return {
        node.target.id: " ".join(inspect.cleandoc(following.value.value).split())
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr)
    }


def to_dict(job: Any) -> dict[str, Any]:
    """A job, or one group of it, as JSON-able nested dicts."""
    return dataclasses.asdict(job)


def from_dict(cls: type[JobT], values: Mapping[str, Any]) -> JobT:
    """The inverse of `to_dict`, for values that have been through JSON (lists become tuples again).

    Raises:
        ValueError: a field is unknown, or a value is refused.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}: written by another version of this code?")
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def differences(saved: Any, current: Any) -> list[str]:
    """Lines `field: saved value, current value`, one for each field in which two groups of one class differ."""
    pairs = [(f.name, getattr(saved, f.name), getattr(current, f.name)) for f in dataclasses.fields(saved)]
    return [f"{name}: checkpoint {old!r}, this run {new!r}" for name, old, new in pairs if old != new]


def _from_json(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value


def _owners(job_class: type) -> dict[str, str]:
    owners: dict[str, str] = {}
    for group, group_class in typing.get_type_hints(job_class).items():
        for field in dataclasses.fields(group_class):
            assert field.name not in owners, f"{field.name} is a field of both {owners[field.name]} and {group}"
            owners[field.name] = group
    return owners


def _help(doc: str, field: dataclasses.Field) -> str:
    default = "required" if _has_no_default(field) else f"default: {_spell(field.default)}"
    return f"{doc} ({default})".replace("%", "%%")


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _spell(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _argument(hint: Any) -> dict[str, Any]:
    """add_argument's keywords for a field type: bool, int, float, str, Literal, X | None, tuple[X, ...]."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        element, *rest = typing.get_args(hint)
        variable = rest == [Ellipsis]
        return {"type": element, "nargs": "*" if variable else 1 + len(rest), "action": _StoreTuple}
    assert hint in (int, float, str), f"no flag for a field of type {hint}"
    return {"type": hint}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse prints its usage first; with a hundred flags that hides the one line that matters.
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
