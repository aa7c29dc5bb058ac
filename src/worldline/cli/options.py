"""Command-line parameters of described fields: one flag a field, no defaults of their own."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from worldline.request import Options, help_of

Described = TypeVar("Described", bound=Options)


def parameters(
    described: type[Options],
    hidden: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    negatable: bool = False,
) -> list[click.Parameter]:
    """A flag, or an argument, for each field that is not hidden; `defaults` are for its help."""
    return [
        make_parameter(name, field, defaults.get(name, field.default), negatable)
        for name, field in described.model_fields.items()
        if name not in hidden
    ]


def make_parameter(name: str, field: FieldInfo, default: Any, negatable: bool) -> click.Parameter:
    """The option of a field; an argument where the field's extras have "argument"."""
    extra: Any = field.json_schema_extra or {}
    name, kind, metavar = field.alias or name, kind_of(field), extra.get("metavar")
    many, required = get_origin(kind) is tuple, field.is_required()
    if extra.get("argument"):
        return click.Argument([name], nargs=-1 if many else 1, required=required, metavar=metavar)
    spelling, kind = f"--{name}", get_args(kind)[0] if many else kind
    settings: dict[str, Any] = {"type": {int: int, float: float}.get(kind, str)}
    if kind is int and (words := words_of(field)):
        settings, metavar = {"type": NumberOrAuto(words)}, "|".join(("N", *words))
    if get_origin(kind) is Literal:  # click's own metavar has _ in place of -
        settings = {"type": click.Choice(get_args(kind))}
        metavar = f"[{'|'.join(map(str, get_args(kind)))}]{'...' if many else ''}"
    elif "optional_value" in extra:
        settings = {"type": bool, "is_flag": False, "flag_value": extra["optional_value"]}
    elif kind is bool:
        settings = {"is_flag": True}
        spelling += f"/--no_{name}" if negatable and not name.startswith("no_") else ""
    settings |= {"metavar": metavar, "default": None, "multiple": many}
    names = [name, *extra.get("short", "").split(), spelling]
    kind = Repeatable if extra.get("single") else click.Option
    return kind(names, help=help_of(field, default), **settings)


class Repeatable(click.Option):
    """An option that may be repeated, each time with one value."""


class NumberOrAuto(click.types.IntParamType):
    """A whole number, or a word."""

    def __init__(self, words: Sequence[str] = ("auto",)) -> None:
        self.words = words

    def convert(self, value: Any, *place: Any) -> Any:
        with suppress(click.BadParameter):
            return value if value in self.words else super().convert(value, *place)
        self.fail(f"{value!r} is not a valid integer, nor {' or '.join(self.words)}.", *place)


def words_of(field: FieldInfo) -> list[str]:
    """Words that a field of numbers takes, too."""
    choices: tuple[Any, ...] = get_args(field.annotation)
    return [word for each in choices if get_origin(each) is Literal for word in get_args(each)]


def kind_of(field: FieldInfo) -> Any:
    """Type of a field without None and annotations; str for a choice that begins with words."""
    kind: Any = field.annotation
    while get_origin(kind) in (Annotated, Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        single = get_origin(kind) is Annotated or len(kinds) == 1
        kind = kinds[0] if single or get_origin(kinds[0]) is Annotated else str
    return kind


def stated(context: click.Context, names: Collection[str]) -> dict[str, Any]:
    """Values of the named flags that were typed."""
    return {n: v for n, v in context.params.items() if n in names and v not in (None, ())}


def parsed(context: click.Context, described: type[Described]) -> Described:
    """A class's values, as typed."""
    return described.parse(stated(context, described.flags().values()))


class ManyValues(click.Command):
    """A command whose repeatable options take several values, as shells make them of a pattern."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = (p for p in self.params if not isinstance(p, Repeatable))
        many = {s for p in options if getattr(p, "multiple", False) for s in p.opts}
        end = args.index("--") if "--" in args else len(args)
        words, option = [], ""
        for word in args[:end]:
            if word.startswith("-") and word != "-":
                name, equals, _ = word.partition("=")
                name = name[:2] + name[2:].replace("-", "_")
                option = name if name in many else ""
                words += [word] if equals or not option else []
            else:  # the option stands before each of its values
                words += [option, word] if option else [word]
        return super().parse_args(ctx, words + args[end:])
