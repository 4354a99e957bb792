"""Dataclasses as command lines: one field is one flag, its default exists once, the string under it is its help.

A *job* is a frozen dataclass whose fields are frozen dataclasses, the groups of flags:

    job = parse_job(DiTJob, DIT_PRESETS, argv)       # default < preset < flag
    from_dict(DiTJob, to_dict(job)) == job           # what is stored as JSON beside every checkpoint

The spelling is Megatron-LM's wherever Megatron-LM has the flag: `tensor_model_parallel_size` is
`--tensor-model-parallel-size`. Unknown and abbreviated flags are errors. A job with two optimizers gives the flags of
the second a prefix:

    critic: OptimizerConfig = prefixed(OptimizerConfig, "critic", lr=4e-4)      # --critic-lr, --critic-min-lr, ...
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from megatron_fsvideo.config.cli import report_error
from megatron_fsvideo.config.rules import Checked, FieldError, has_no_default

T = TypeVar("T")
JobT = TypeVar("JobT")
Presets = Mapping[str, Mapping[str, Any]]


def prefixed(group_class: type[T], prefix: str, **defaults: Any) -> T:
    """A field of a job: a group of flags whose names begin with `prefix`.

    Args:
        defaults: field name, without the prefix -> default in this job, where it differs from the class's.
    """
    factory = functools.partial(group_class, **defaults)
    return dataclasses.field(default_factory=factory, metadata={"prefix": f"{prefix}_"})


def parse_job(job_class: type[JobT], presets: Presets | None = None, argv: Sequence[str] | None = None) -> JobT:
    """Build a job from a command line. A bad value ends the program with one line that says what is wrong.

    Args:
        job_class: dataclass whose fields are the groups of flags.
        presets: preset name -> flag's name -> value; with presets the parser has `--preset`.
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


def given_preset(argv: Sequence[str] | None = None) -> str | None:
    """The name after `--preset` on a command line (`sys.argv[1:]` when None); None without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    return parser.parse_known_args(argv)[0].preset


def spell_flags(group: Any, base: Any) -> list[str]:
    """The words of a command line that make `group` of `base`, two groups of one class, without prefix."""
    words = []
    for field in dataclasses.fields(group):
        value, flag = getattr(group, field.name), "--" + field.name.replace("_", "-")
        if value == getattr(base, field.name) or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return words


def build_job(job_class: type[JobT], values: Mapping[str, Any]) -> JobT:
    """Assign flat `name -> value` pairs to the groups of `job_class`; a name is a group's prefix and a field's name.

    Raises:
        ValueError: a name that no group has, a field without default and value, or a value that a group refuses.
    """
    groups = list(_groups(job_class))
    names = _field_names(job_class)
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{job_class.__name__} has no field {', '.join(unknown)}")
    return job_class(**{group.name: _build_group(group, values) for group in groups})


def presets_for(job_class: type, presets: Presets) -> dict[str, dict[str, Any]]:
    """Presets without the values for which this job has no field."""
    names = _field_names(job_class)
    return {name: {key: preset[key] for key in preset if key in names} for name, preset in presets.items()}


def make_parser(job_class: type, presets: Presets | None = None) -> argparse.ArgumentParser:
    """The argparse parser of a job: one argument group per dataclass. Flags that are not given are absent."""
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=inspect.getdoc(job_class),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_formatter,
    )
    if presets is not None:
        text = f"Set of values to start from; flags override them. One of {', '.join(sorted(presets))}."
        parser.add_argument("--preset", choices=sorted(presets), metavar="NAME", help=text)
    for group in _groups(job_class):
        title = inspect.getdoc(group.cls).split("\n")[0]
        lines = parser.add_argument_group(f"{group.prefix}{group.cls.__name__}: {title}")
        docs, hints = field_docs(group.cls), typing.get_type_hints(group.cls, include_extras=True)
        for field in dataclasses.fields(group.cls):
            lines.add_argument(
                group.flag(field.name), help=_help(docs[field.name], field, group), **_argument(hints[field.name])
            )
    return parser


@dataclass(frozen=True)
class _Group:
    """One group of flags of a job: the job's field, its class, its prefix, and its values without any flag.

    `defaults` is None for a group with required fields.
    """

    name: str
    cls: type
    prefix: str
    defaults: Any

    def flag(self, field: str) -> str:
        return "--" + (self.prefix + field).replace("_", "-")


def _groups(job_class: type) -> Iterator[_Group]:
    hints = typing.get_type_hints(job_class)
    for field in dataclasses.fields(job_class):
        if not issubclass(hints[field.name], Checked):
            raise TypeError(
                f"{hints[field.name].__name__}, a group of flags, must be Checked: its values come from users"
            )
        has_factory = field.default_factory is not dataclasses.MISSING
        defaults = field.default_factory() if has_factory else None
        yield _Group(field.name, hints[field.name], field.metadata.get("prefix", ""), defaults)


def _build_group(group: _Group, values: Mapping[str, Any]) -> Any:
    fields = dataclasses.fields(group.cls)
    own = {field.name: values[group.prefix + field.name] for field in fields if group.prefix + field.name in values}
    if group.defaults is None:
        if missing := [group.flag(field.name) for field in fields if has_no_default(field) and field.name not in own]:
            raise ValueError(f"{' '.join(missing)} is required")
    try:
        return group.cls(**own) if group.defaults is None else dataclasses.replace(group.defaults, **own)
    except FieldError as error:
        raise error.prefixed(group.prefix) from None


def _field_names(job_class: type) -> set[str]:
    names: set[str] = set()
    for group in _groups(job_class):
        for field in dataclasses.fields(group.cls):
            name = group.prefix + field.name
            assert name not in names, f"{job_class.__name__} has two fields {name}: give one group a prefix"
            names.add(name)
    return names


@functools.cache
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


def differences(saved: Any, current: Any) -> list[str]:
    """Lines `field: saved value, current value`, one for each field in which two groups of one class differ."""
    pairs = [(f.name, getattr(saved, f.name), getattr(current, f.name)) for f in dataclasses.fields(saved)]
    return [f"{name}: checkpoint {old!r}, this run {new!r}" for name, old, new in pairs if old != new]


def _help(doc: str, field: dataclasses.Field, group: _Group) -> str:
    if group.defaults is None and has_no_default(field):
        return f"{doc} (required)".replace("%", "%%")
    default = field.default if group.defaults is None else getattr(group.defaults, field.name)
    return f"{doc} (default: {_spell(default)})".replace("%", "%%")


def _spell(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if value == "":
        return "empty"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _argument(hint: Any) -> dict[str, Any]:
    """add_argument's keywords for a field type: bool, int, float, str, Literal, X | None, tuple[X, ...], Annotated."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        element, *rest = typing.get_args(hint)
        nargs = "*" if rest == [Ellipsis] else 1 + len(rest)
        return _argument(element) | {"nargs": nargs, "action": _StoreTuple}
    assert hint in _METAVARS, f"no flag for a field of type {hint}"
    return {"type": hint, "metavar": _METAVARS[hint]}


_METAVARS = {int: "N", float: "X", str: "TEXT"}
_HELP_WIDTH = 110
_LONGEST_ERROR = 1500


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=_HELP_WIDTH)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse prints its usage first, which with a hundred flags hides the error.
        shown = " ".join(message.split())
        shown = shown if len(shown) <= _LONGEST_ERROR else f"{shown[:_LONGEST_ERROR]}..."
        report_error(f"{self.prog}: error: {shown} (--help lists the flags)")
        sys.exit(2)


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
