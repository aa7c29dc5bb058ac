"""Compares a command's options with those that the released parsers have."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
import pytest

from worldline.cli.main import main

TABLE = Path(__file__).resolve().parents[1] / "data" / "cli_parity.json"
NAMES = {"str": "text", "int": "integer", "float": "float", "flag": "boolean"}


def variants(path: str) -> list[Any]:
    """Return the releases of the scripts whose path ends with `path`, as test parameters."""
    return [
        pytest.param(variant, id=f"{script['path'].split('/')[0]}-{number}")
        for script in json.loads(TABLE.read_text())["scripts"]
        if script["path"].endswith(path)
        for number, variant in enumerate(script["variants"])
    ]


def check_options(
    group: str,
    name: str,
    variant: dict[str, Any],
    *,
    of_a_generation: Collection[str],
    more: Collection[str] = (),
) -> None:
    """Fail unless `worldline GROUP NAME` takes every flag of the release, of its type and default.

    Args:
        group: of commands.
        name: of the command.
        variant: the release.
        of_a_generation: flags whose default names a checkpoint of the release's generation.
        more: flags that take more than the release's choices.
    """
    found = main.get_command(click.Context(main), group)
    assert isinstance(found, click.Group)
    command = found.commands[name]
    options = {spelling: p for p in command.params for spelling in p.opts}
    defaults = command.make_context(name, []).params
    newest = any("2025-06" in release for release in variant["releases"])
    for flag in variant["args"]:
        option = options[flag["name"]]
        assert isinstance(option, click.Option)
        assert option.name == flag["dest"]
        assert option.is_flag == (flag["type"] == "flag")
        if isinstance(option.type, click.Choice):
            assert [str(c) for c in option.type.choices] == [str(c) for c in flag["choices"]]
        else:
            assert flag["choices"] is None or flag["name"] in more
            assert option.type.name == NAMES[flag["type"]]
        if newest or flag["name"] not in of_a_generation:
            assert defaults[flag["dest"]] == flag["default"]
