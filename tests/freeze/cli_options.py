"""Every option of every command of the `worldline` on the path, as JSON on standard output.

PYTHONPATH=src python tests/freeze/cli_options.py > tests/data/cli_options.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import click


def commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Commands below a group, groups included, by their words."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            below = command.get_command(context, word)
            assert below is not None
            yield from commands(below, f"{name} {word}".strip())


def kind_of(kind: click.ParamType[Any]) -> str:
    """Type in one word: a range is that of its numbers, a path is text."""
    if isinstance(kind, click.Path | click.File):
        return "text"
    return kind.name.removesuffix(" range")


def default_of(parameter: click.Parameter) -> Any:
    """Default as the help text ends in brackets, else as declared; None where neither says one."""
    text = getattr(parameter, "help", None) or ""
    if bracket := re.search(r"\[default: ([^\]]*)\]\.?$", text):
        return bracket[1]
    declared = parameter.to_info_dict()["default"]
    if declared is None or "Sentinel" in type(declared).__name__:
        return None
    return declared if isinstance(declared, str | bool | int | float) else str(declared)


def describe(parameter: click.Parameter) -> dict[str, Any]:
    found = {
        "names": sorted(parameter.opts),
        "off": sorted(parameter.secondary_opts),
        "type": kind_of(parameter.type),
        "choices": sorted(map(str, getattr(parameter.type, "choices", ()))),
        "is_flag": bool(getattr(parameter, "is_flag", False)),
        "multiple": bool(getattr(parameter, "multiple", False)),
        "nargs": parameter.nargs,
        "required": parameter.required,
        "default": default_of(parameter),
    }
    return {"argument": isinstance(parameter, click.Argument), **found}


def options(main: click.Command) -> dict[str, list[dict[str, Any]]]:
    """Command -> its parameters, in their order."""
    return {name: [*map(describe, command.params)] for name, command in commands(main)}


if __name__ == "__main__":
    from worldline.cli.main import main

    lines = [
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, found)) + "\n ]"
        for name, found in options(main).items()
    ]
    print("{\n " + ",\n ".join(lines) + "\n}")
