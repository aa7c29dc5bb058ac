"""The videos of a batch get the names that the reference gives them.

Where the reference numbers the lines that remain after dropping bad ones, ours refuses the batch,
so names are compared only for batches whose lines are all valid, with different base names. Blank
lines, and pictures with an alpha channel or in grey, end the reference; ours reads past the former
and reads the latter, so which lines are bad is decided by their content.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import Case, cases

from worldline.cli.inputs import TYPED_MEDIA
from worldline.cli.run import check_items
from worldline.errors import InputError
from worldline.families.autoregressive.request import ARRequest
from worldline.family import Item
from worldline.shapes import VideoShape
from worldline.video.read import media_kind, read_image, read_video

AR_CASES = cases("ar_video_io")
FIELD = "visual_input"
FAMILY = SimpleNamespace(
    request=ARRequest,
    check=lambda opened, request: request,
    video=lambda opened, request: VideoShape(33, 640, 1024),
    holds_batch=lambda *_: True,
)
OPTIONS = SimpleNamespace(disable_guardrail=True)
OPENED: Any = SimpleNamespace(family=FAMILY, defaults={}, options=OPTIONS)


def base_batches(case: Case) -> list[dict[str, Any]]:
    return [batch for batch in case.spec.get("batches", []) if batch["script"] == "base"]


def num_frames(batch: dict[str, Any]) -> int:
    return 1 if batch["input_type"] == "image" else batch["num_input_frames_flag"]


def read(batch: dict[str, Any]) -> tuple[list[Item], list[str]]:
    """Items of a batch, and what is wrong with it."""
    options = {"batch_input_path": batch["jsonl"], "input_type": batch["input_type"]}
    stated = {"num_input_frames": num_frames(batch)}
    items, problems = TYPED_MEDIA.read(TYPED_MEDIA.flags.parse(options), stated)
    try:
        check_items(OPENED, items, problems)
    except InputError as error:
        problems = str(error).splitlines()
    return items, problems


def lines_of(case: Case, batch: dict[str, Any]) -> dict[int, str]:
    """Return the lines that are not blank, by their 1-based number."""
    lines = (case.path / batch["jsonl"]).read_text().split("\n")
    return {number: line for number, line in enumerate(lines, start=1) if line.strip()}


def input_of(line: str) -> str | None:
    """Return the path that a line names; None where it is no object with one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    name = entry.get(FIELD) if isinstance(entry, dict) else None
    return name if isinstance(name, str) and name else None


def is_bad(case: Case, batch: dict[str, Any], line: str) -> bool:
    """Whether the line names no file, or one that is missing, of the wrong type or too short."""
    name = input_of(line)
    if name is None:
        return True
    beside = (case.path / batch["jsonl"]).parent
    path = next((at / name for at in (case.path, beside) if (at / name).is_file()), None)
    if path is None:
        return True
    try:
        if media_kind(path) != batch["input_type"]:
            return True
        clip = read_image(path) if batch["input_type"] == "image" else read_video(path)
    except InputError:  # no media of ours, whatever its name says
        return True
    return len(clip.frames) < num_frames(batch)


@pytest.mark.parametrize("case", AR_CASES, ids=str)
def test_names(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.path)
    for batch in base_batches(case):
        if batch["error"]:
            continue
        inputs = [input_of(line) or "" for line in lines_of(case, batch).values()]
        names = [Path(path).name for path in inputs]
        taken = {path["made_from"] for path in batch["saved"]}
        # what the guardrail blocked is valid, and used up its number
        all_valid = len(taken) + len(batch["blocked_calls"]) == len(inputs)
        if not all_valid or len(set(names)) < len(names):
            continue
        frames = num_frames(batch)
        items, problems = read(batch)
        assert not problems
        ours = {item.output.name: str(item.input) for item in items}
        assert len(ours) == len(inputs)
        for saved in batch["saved"]:
            assert ours[saved["file"]] == saved["made_from"], batch["jsonl"]
            assert frames == saved["num_input_frames"]
            assert saved["fps"] == 25


@pytest.mark.parametrize("case", AR_CASES, ids=str)
def test_bad_lines_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bad line is named, and no other; a batch without one passes."""
    monkeypatch.chdir(case.path)
    for batch in base_batches(case):
        lines = lines_of(case, batch)
        bad = [number for number, line in lines.items() if is_bad(case, batch, line)]
        if not lines:
            with pytest.raises(InputError, match="no input"):
                read(batch)
            continue
        items, problems = read(batch)
        named = [int(found[1]) for line in problems if (found := re.search(r" line (\d+) ", line))]
        assert sorted(set(named)) == bad, batch["jsonl"]
        assert len(named) == len(problems)
        if not bad:
            assert [int(item.output.stem) + 1 for item in items] == list(lines)
