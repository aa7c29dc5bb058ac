"""Messages fit on a screen, whatever stands in them."""

from __future__ import annotations

import numpy as np
import pytest

from worldline.errors import InputError, brief, printable
from worldline.families.predict2_5.request import FlowRequest
from worldline.locate import locate


def test_values_are_cut() -> None:
    long = "x" * 10**6
    for value in (long, [[0] * 10**6] * 9, 10**5000, {"a": long}, np.zeros(10**6)):
        assert 5 < len(brief(value)) <= 80


def test_messages_are_cut_and_escaped() -> None:
    assert printable("a: é 漢 is wrong\n") == "a: é 漢 is wrong"
    assert printable("a\x1b[2J\x07\u202e\udcff\tb") == r"a\x1b[2J\x07\u202e\udcff\tb"
    for message in ("x" * 10**6, "\x1b" * 3000, "\n".join(["line"] * 10**5), "\n".join("ab" * 999)):
        assert len(printable(message)) <= 2000
    start, *rows, end = printable("\n".join(f"row {n} {'x' * 300}" for n in range(12345))).split(
        "\n"
    )
    assert start.startswith("row 0 ")
    assert end == f"and {12344 - len(rows):,} more"
    assert printable(f"a {'x' * 5000}; give b").endswith("x; give b")


def test_a_request_names_few_of_many_problems() -> None:
    with pytest.raises(InputError) as caught:
        FlowRequest.parse({f"field{n}": "x" for n in range(5000)})
    assert len(str(caught.value).splitlines()) <= 20
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(InputError, match=name):
            FlowRequest.parse({name: "x" * 10**7})
    with pytest.raises(InputError, match="not the name"):
        locate("a\0b\udcff", "checkpoints")
