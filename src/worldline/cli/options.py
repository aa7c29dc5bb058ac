"""Command-line options of described fields: one flag a field, no defaults of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from worldline.request import NEGATIVE_PROMPT, Options, flag

Described = TypeVar("Described", bound=Options)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(
    described: type[Options],
    *,
    hidden: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    negatable: bool = False,
) -> Decorator:
    """Add a flag for each field of a class.

    Args:
        described: the class.
        hidden: fields without a flag.
        defaults: what the help shows in place of the class's defaults.
        negatable: whether a boolean flag has a --no_… form.
    """
    found = [
        make_option(name, field, (defaults or {}).get(name, field.default), negatable)
        for name, field in described.model_fields.items()
        if name not in hidden
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        # as click's own decorators do, so that both may stand above one function
        parameters: list[click.Parameter] = getattr(command, "__click_params__", [])
        command.__click_params__ = [*parameters, *reversed(found)]  # type: ignore[attr-defined]
        return command

    return add


def make_option(name: str, field: FieldInfo, default: Any, negatable: bool) -> click.Parameter:
    """The option, or the argument, of a field."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    name, kind = field.alias or name, kind_of(field)
    given: dict[str, Any] = {"metavar": extra.get("metavar"), "default": None}
    if extra.get("argument"):
        return click.Argument([name], nargs=-1, metavar=given["metavar"])
    pair = negatable and kind is bool and "optional_value" not in extra
    spelling = f"--{name}/--no_{name}" if pair else f"--{name}"
    if extra.get("text"):
        given["type"] = str
    elif get_origin(kind) in (tuple, Literal):
        given["multiple"] = get_origin(kind) is tuple
        if given["multiple"]:
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:  # click's own metavar has _ in place of -
            choices = "|".join(map(str, get_args(kind)))
            given["type"] = click.Choice(get_args(kind))
            given["metavar"] = f"[{choices}]{'...' if given['multiple'] else ''}"
    elif "optional_value" in extra:
        given |= {"type": bool, "is_flag": False, "flag_value": extra["optional_value"]}
    elif kind is bool:
        given |= {"is_flag": True, "default": False}
    else:
        given["type"] = kind if kind in (int, float) else str
    short = [str(extra["short"])] if "short" in extra else []
    return click.Option([name, *short, spelling], help=help_of(field, default), **given)


def help_of(field: FieldInfo, default: Any) -> str:
    """Help text, the default last in brackets."""
    text = field.description or ""
    if "[default:" in text or default is None or default is False:
        return text
    if default in (NEGATIVE_PROMPT, ()):
        return text
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return f"{text}  [default: {default}]"


def kind_of(field: FieldInfo) -> Any:
    """Type of a field without None and annotations."""
    kind = field.annotation
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType):
            kind = next(each for each in get_args(kind) if each is not NoneType)
        else:
            return kind


def stated(context: click.Context, names: Collection[str]) -> dict[str, Any]:
    """Values of the named flags that were typed."""
    return {
        name: value
        for name, value in context.params.items()
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def parsed(context: click.Context, described: type[Described]) -> Described:
    """A class's values, as typed.

    Raises:
        InputError: one is wrong.
    """
    return described.parse(stated(context, fields_of(described)), flag)


def fields_of(described: type[Options]) -> list[str]:
    """Names by which a class's flags are known."""
    return [field.alias or name for name, field in described.model_fields.items()]


class ManyValues(click.Command):
    """A command with options that take several values, as shells make them of a pattern.

    Attributes:
        many: spellings of these options.
    """

    many: tuple[str, ...] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._repeated(args, ctx))

    def _repeated(self, words: Sequence[str], context: click.Context) -> list[str]:
        """The words with the option before each of its values."""
        found: list[str] = []
        option, waiting = "", False
        for position, word in enumerate((*words, "--")):
            if len(word) > 1 and word.startswith("-"):
                if waiting:
                    raise click.UsageError(f"{option} needs a value", context)
                if word == "--":
                    return [*found, *words[position:]]
                name, _, value = word.partition("=")
                name = f"{name[:2]}{name[2:].replace('-', '_')}"
                option = name if name in self.many else ""
                waiting = bool(option) and not value
                if not waiting:
                    found.append(word)
            else:
                found += [option, word] if option else [word]
                waiting = False
        return found
