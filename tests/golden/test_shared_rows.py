"""Golden clips of the video tokenizers, of which each of two processes codes half the rows."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases

from tests.parallel.test_halo import decode, encode
from tests.ranks import Together
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.tokenizers.wan.weights import open_wan

WAN = cases("wan_vae_tiny")
COSMOS = cases("tok_cv_tiny") + cases("tok_dv_tiny")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", WAN, ids=str)
def test_wan(two: Together, case: Case) -> None:
    path = case.path / case.spec["checkpoint"] if "checkpoint" in case.spec else case.path
    model = open_wan(path).read("cpu", torch.float32)
    for name in case.names("encode.*.video"):
        for found in two(encode, model, case.tensor(name)):
            case.compare(name.replace("video", "latent"), found)
    for name in case.names("decode.*.latent"):
        for found in two(decode, model, case.tensor(name)):
            case.compare(name.replace("latent", "video"), found)


@pytest.mark.parametrize("case", COSMOS, ids=str)
def test_cosmos(two: Together, case: Case) -> None:
    model = open_tokenizer(case.path / case.spec["folder"]).read("cpu", torch.float32)
    coded = 0
    for name in case.names("t*.video"):
        if case.tensor(name).shape[3] < 2 * model.config.spatial:
            continue  # a single row
        stored = name.replace("video", "indices" if model.config.levels else "latent")
        for found in two(encode, model, case.tensor(name)):
            case.compare(stored, found)
        for found in two(decode, model, case.tensor(stored)):
            case.compare(name.replace("video", "recon"), found)
        coded += 1
    assert coded > 1
