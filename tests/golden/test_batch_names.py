"""The videos of a batch get the names that the reference gives them.

Where the reference numbers what is left after dropping bad lines, ours refuses the batch, so only
batches whose lines are all valid, with different base names, are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import Case, cases

from worldline.cli.inputs import FIELD, read_batch
from worldline.errors import InputError

AR_CASES = cases("ar_video_io")


def base_batches(case: Case) -> list[dict[str, Any]]:
    return [batch for batch in case.spec.get("batches", []) if batch["script"] == "base"]


def inputs_of(case: Case, batch: dict[str, Any]) -> list[str]:
    """Return the inputs that the lines name; a line without one gives ""."""
    lines = (case.path / batch["jsonl"]).read_text().splitlines()
    return [json.loads(line).get(FIELD, "") for line in lines if line.strip()]


@pytest.mark.parametrize("case", AR_CASES, ids=str)
def test_names(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.path)
    for batch in base_batches(case):
        kind = batch["input_type"]
        frames = 1 if kind == "image" else batch["num_input_frames_flag"]
        inputs = inputs_of(case, batch)
        names = [Path(path).name for path in inputs]
        taken = {path["made_from"] for path in batch["saved"]}
        # what the guardrail blocked is valid, and used up its number
        all_valid = len(taken) + len(batch["blocked_calls"]) == len(inputs)
        if batch["error"] or not all_valid or len(set(names)) < len(names):
            continue
        items = read_batch(batch["jsonl"], kind, frames)
        ours = {f"{item.number}.mp4": str(item.path) for item in items}
        assert len(ours) == len(inputs)
        for saved in batch["saved"]:
            assert ours[saved["file"]] == saved["made_from"], batch["jsonl"]
            assert frames == saved["num_input_frames"]
            assert saved["fps"] == 25


@pytest.mark.parametrize("case", AR_CASES, ids=str)
def test_bad_lines_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reference drops lines or breaks down, every such line is named."""
    monkeypatch.chdir(case.path)
    for batch in base_batches(case):
        kind = batch["input_type"]
        frames = 1 if kind == "image" else batch["num_input_frames_flag"]
        if not batch["error"]:
            continue
        with pytest.raises(InputError, match=r"line \d+: ") as caught:
            read_batch(batch["jsonl"], kind, frames)
        if FIELD in batch["error"]:
            assert "assets/autoregressive/batch_inputs/base.jsonl" in str(caught.value)
