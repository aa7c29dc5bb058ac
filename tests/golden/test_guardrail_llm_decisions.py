"""Answers of guard models against the golden cases of kind guardrail_llm_decisions."""

from __future__ import annotations

import re

import pytest
from cases import Case, cases

from worldline.guardrails.language import AEGIS, LLAMA_GUARD_3, QWEN3GUARD
from worldline.text.upsampler import clean, shrunk

CASES = cases("guardrail_llm_decisions")
MODELS = {model.name: model for model in (AEGIS, LLAMA_GUARD_3, QWEN3GUARD)}


def stored_categories(guard: str, message: str) -> list[str]:
    """Return the categories that a message of the reference names."""
    if guard == "aegis":
        return [message.split(":")[0]] if ": This prompt" in message else []
    if guard == "llama_guard_3":
        named = re.search(r"Violations: (.*)\.$", message)
        return named[1].split(", ") if named else []
    return re.findall(r"'([^']*)'", message)


@pytest.mark.parametrize("guard", sorted(MODELS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdict_and_categories(case: Case, guard: str) -> None:
    assert case.spec[guard]
    for record in case.spec[guard]:
        verdict = MODELS[guard].decide(record["output"])
        if record["message"].startswith("Unexpected error"):
            assert not verdict.safe, record  # the reference lets these through
        else:
            assert verdict.safe == record["is_safe"], record
            assert list(verdict.reasons) == stored_categories(guard, record["message"]), record


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_of_upsamplers_are_cleaned(case: Case) -> None:
    assert case.spec["clean_text"]
    for record in case.spec["clean_text"]:
        assert clean(record["in"]) == record["out"], record


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pictures_are_scaled_down(case: Case) -> None:
    assert case.spec["pixtral_resize"]
    for record in case.spec["pixtral_resize"]:
        assert shrunk(*record["in_w_h"]) == tuple(record["out_w_h"]), record
