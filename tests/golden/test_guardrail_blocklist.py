"""The blocklist against the golden cases of kind guardrail_blocklist."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cases import Case, cases

from worldline.guardrails.base import Verdict
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist

CASES = cases("guardrail_blocklist")
SETTINGS = {"predict": PREDICT, "cosmos1": COSMOS1}


def folder_of(case: Case) -> Path:
    [custom] = case.path.rglob("custom")
    return custom.parent


@cache
def records(case: Case) -> list[dict[str, Any]]:
    text = (case.path / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def agrees(record: dict[str, Any], verdict: Verdict, stored: dict[str, Any]) -> bool:
    if record.get("nltk_3_10_4_is_safe", stored["is_safe"]) != stored["is_safe"]:
        return True  # the case says that either answer is right
    if stored["is_safe"] is None:  # the reference raises at one of these
        return not verdict.safe and verdict.reasons in (("censor",), ("censor_lemma",))
    return verdict == Verdict(stored["is_safe"], tuple(filter(None, [stored["stage"]])))


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdict_and_stage(case: Case, settings: str) -> None:
    guard = Blocklist(folder_of(case), SETTINGS[settings])
    assert len(records(case)) == case.spec["counts"]["prompts"]
    wrong = [
        (record["id"], record["prompt"], verdict, record[settings])
        for record in records(case)
        if not agrees(
            record, verdict := guard.check_as_released(record["prompt"]), record[settings]
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_look_alikes_are_all_that_is_refused_beside(case: Case, settings: str) -> None:
    guard = Blocklist(folder_of(case), SETTINGS[settings])
    for record in records(case):
        verdict = guard.check(record["prompt"])
        if verdict != guard.check_as_released(record["prompt"]):
            assert not record["prompt"].isascii(), record
            assert not verdict.safe
            assert verdict.reasons[1:] == ("look-alikes",)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_and_lemmas(case: Case) -> None:
    words = Blocklist(folder_of(case)).words
    for record in records(case):
        if "nltk_3_10_4_is_safe" not in record:
            assert words.tokens(record["ascii"]) == record["tokens"], record["id"]
            assert words.lemmas(record["ascii"]) == record["lemmas"], record["id"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_settings_are_those_of_the_case(case: Case) -> None:
    for name, near in SETTINGS.items():
        stored = case.spec["settings"][name]
        assert near.shortest == stored["partial_match_min_chars"]
        assert near.insertion == (stored["partial_match_letter_count"] >= 0.5)
    combinations = case.spec["max_number_combinations_after_load"]
    assert Blocklist(folder_of(case)).censor.joined == combinations
