"""The frame classifier against the golden cases of kind guardrail_video_classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Case, cases

from worldline.guardrails.frames import (
    CLASSES,
    PREDICT1,
    PREDICT2_5,
    FrameFeatures,
    Rule,
    frame_classifier,
    key_map,
)
from worldline.weights.networks import read_network

CASES = cases("guardrail_video_classifier")
RULES = {
    "cosmos1": PREDICT1,
    "predict1": PREDICT1,
    "p25_20251006": Rule(PREDICT2_5.unsafe, 0.0),
    "p25_20251013": PREDICT2_5,
    "p25_20251219": PREDICT2_5,
}
# what the reference's crashes stand for
CRASHES = {"ZeroDivisionError": True, "NameError": False}


def classifier_file(case: Case) -> Path:
    [path] = case.path.rglob("safety_filter.pt")
    return path


def siglip_folder(case: Case) -> Path:
    [config] = case.path.rglob("preprocessor_config.json")
    return config.parent


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_classes(case: Case) -> None:
    logits = read_network(frame_classifier, classifier_file(case), key_map)(case.tensor("features"))
    case.compare("logits", logits)
    case.compare("classes", logits.argmax(-1))
    assert list(CLASSES) == case.spec["model"]["class_names"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_features(case: Case) -> None:
    features = FrameFeatures(siglip_folder(case))
    names = case.names("image[0-9]*")
    assert names
    for name in names:
        number = name.removeprefix("image")
        frames = case.tensor(name)[None].numpy()
        case.compare(f"pixel_values{number}", features.pixels(frames))
        pixels = case.tensor(f"pixel_values{number}")
        pooled = features.network(pixel_values=pixels).pooler_output
        case.compare(f"image_features{number}", pooled)
        case.compare(f"image_features_norm{number}", F.normalize(pooled, dim=-1))
        case.compare(f"image_features_norm{number}", features(frames))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verdicts(case: Case) -> None:
    scores = read_network(frame_classifier, classifier_file(case), key_map)(case.tensor("features"))
    assert case.spec["videos"]
    for video in case.spec["videos"]:
        rows = torch.tensor(video["frames"], dtype=torch.int64)
        classes = scores[rows].argmax(-1).tolist()
        assert classes == video["classes"]
        for release, stored in video["is_safe"].items():
            safe = CRASHES.get(stored, stored)
            assert RULES[release].refuses(classes) == (not safe), (release, video)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
