"""No option of 7f4d740 is lost or retyped: `tests/freeze/cli_options.py` wrote the frozen file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from worldline.cli.main import main

from .freeze.cli_options import options

FROZEN = json.loads((Path(__file__).parent / "data" / "cli_options.json").read_text())
CURRENT = options(main)
SAME = ("type", "is_flag", "multiple", "nargs", "required")


def number_or_word(value: object) -> float | str:
    try:
        return float(str(value))
    except ValueError:
        return str(value).rstrip("/")


@pytest.mark.parametrize("command", FROZEN)
def test_options_are_kept(command: str) -> None:
    current = CURRENT[command]
    by_name = {name: found for found in current for name in found["names"]}
    negated = {name for found in current for name in found["off"]}
    for frozen in (one for one in FROZEN[command] if not one["argument"]):
        assert negated.issuperset(frozen["off"])
        for name in frozen["names"]:
            found = by_name[name]
            assert [found[key] for key in SAME] == [frozen[key] for key in SAME], name
            assert set(found["choices"]) >= set(frozen["choices"]), name
            check_default(name, frozen["default"], found["default"])


def check_default(name: str, frozen: Any, found: Any) -> None:
    """A number or a single word stays as it is; sentences and flags are tested elsewhere."""
    if frozen is None or isinstance(frozen, bool) or " " in str(frozen):
        return
    words = [number_or_word(word) for word in re.split("[;, ]+", str(found))]
    assert number_or_word(frozen) in words, f"{name}: {frozen} was the default, now {found}"


@pytest.mark.parametrize("command", FROZEN)
def test_arguments_are_kept(command: str) -> None:
    shapes = [
        [(one["nargs"], one["required"]) for one in found if one["argument"]]
        for found in (FROZEN[command], CURRENT[command])
    ]
    assert shapes[0] == shapes[1]
