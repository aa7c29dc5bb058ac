"""The text encoder against the golden cases of kind t5_tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, cases

from worldline.text.t5 import T5Encoder, T5Files

CASES = cases("t5_tiny")


def folder_of(case: Case) -> Path:
    [config] = case.path.rglob("config.json")
    return config.parent


def encoder_of(case: Case) -> T5Encoder:
    return T5Files.open(folder_of(case)).read("cpu", torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_encode(case: Case) -> None:
    encoder = encoder_of(case)
    for i, (prompts, length) in enumerate(
        zip(case.spec["prompts"], case.spec["max_length"], strict=True)
    ):
        encoder.max_length = length
        ids, mask = encoder.tokenize(prompts)
        case.compare(f"ids{i}", ids)
        case.compare(f"mask{i}", mask)
        embeddings = encoder.encode(prompts)
        case.compare(f"emb{i}", embeddings)
        case.compare(f"emb{i}", encoder.embed(ids, mask))
        assert not embeddings[mask == 0].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_is_computed_as_the_reference_does(case: Case) -> None:
    encoder = encoder_of(case)
    for name in case.names("unmasked*"):
        number = name.removeprefix("unmasked")
        ids, mask = (case.tensor(f"{kind}{number}") for kind in ("ids", "mask"))
        case.compare(name, encoder.hidden(ids, mask))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_of_training(case: Case) -> None:
    """The script that prepares data keeps the rows of the tokens alone, in float16."""
    encoder = encoder_of(case)
    for name in case.names("pickle_emb*"):
        number = int(name.removeprefix("pickle_emb"))
        prompt, length = case.spec["prompts"][number][0], case.spec["max_length"][number]
        encoder.max_length = length
        rows = encoder.encode([prompt])[0, : len(encoder.tokenizer.encode(prompt))]
        # Both were rounded to float16, where neighbours may fall on either side.
        gap = (rows.half().float() - case.tensor(name)).abs()
        assert (gap <= case.tensor(name).abs() * 2**-10 + 1e-5).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
