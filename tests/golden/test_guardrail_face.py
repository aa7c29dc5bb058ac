"""Face detection and blurring against the golden cases of kind guardrail_face."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, cases

from worldline.guardrails.faces import (
    FaceBlur,
    RetinaFace,
    blur,
    decode,
    key_map,
    pixelate,
    prepare,
    priors,
    select,
)
from worldline.weights.networks import read_network

CASES = cases("guardrail_face")


def recipe_weights(case: Case) -> dict[str, torch.Tensor]:
    """Return the state dict of the case, drawn as its `weights_recipe` says."""
    shapes = json.loads((case.path / "retinaface_resnet50_keys.json").read_text())
    found = re.search(r"RandomState\((\d+) \+ i\)", case.spec["weights_recipe"]["rule"])
    assert found is not None
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros((), dtype=torch.int64)
            continue
        z = np.random.RandomState(int(found[1]) + number).standard_normal(shape)
        if name.endswith("running_var"):
            z = 0.8 + 0.25 * np.abs(z)
        elif name.endswith("running_mean"):
            z = 0.1 * z
        elif len(shape) == 4:
            z = z * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith(".weight"):
            z = 0.5 + 0.05 * z
        else:
            z = 0.05 * z
        tensors[name] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return tensors


def network_of(case: Case, folder: Path) -> RetinaFace:
    """Write the file as released, and read it."""
    path = folder / "Resnet50_Final.pth"
    torch.save({f"module.{name}": t for name, t in recipe_weights(case).items()}, path)
    return read_network(RetinaFace, path, key_map)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_network(case: Case, tmp_path: Path) -> None:
    network = network_of(case, tmp_path)
    images = prepare(case.tensor("net_image"))
    with torch.inference_mode():
        levels = network.fpn(network.body(images).feature_maps)
        case.compare("net_fpn_0_mean", levels[0].mean((2, 3)))
        case.compare("net_fpn_2", levels[2])
        boxes, scores = network(images)
        case.compare("net_loc", boxes)
        case.compare("net_conf", scores)
        case.compare("net_landm", network.join(network.LandmarkHead, network.maps(images)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_priors_and_boxes(case: Case) -> None:
    for name in case.names("priors_*"):
        height, width = map(int, name.removeprefix("priors_").split("x"))
        case.compare(name, priors(height, width))
    frames = case.tensor("frames_in")
    height, width = frames.shape[1:3]
    boxes = decode(case.tensor("loc"), priors(height, width))
    case.compare("boxes_rel", boxes)
    pixels = boxes * torch.tensor([width, height, width, height])
    case.compare("boxes_px", pixels)
    for number, (corners, scores) in enumerate(zip(pixels, case.tensor("conf"), strict=True)):
        case.compare(f"kept_{number}", select(corners.numpy(), scores[:, 1].numpy()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_select(case: Case) -> None:
    for name in case.names("nms*_kept"):
        line = case.spec["tensors"][name]
        found = re.search(r"confidence>([\d.]+), nms ([\d.]+), top_k (\d+), keep_top_k (\d+)", line)
        assert found is not None, line
        number = name.removesuffix("_kept")
        kept = select(
            case.tensor(f"{number}_boxes").numpy(),
            case.tensor(f"{number}_scores").numpy(),
            min_score=float(found[1]),
            max_overlap=float(found[2]),
            candidates=int(found[3]),
            keep=int(found[4]),
        )
        case.compare(name, kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pixelate(case: Case) -> None:
    names = case.names("pix*_in")
    assert names
    for name in names:
        case.compare(name.replace("_in", "_out"), pixelate(case.tensor(name).numpy()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frames(case: Case) -> None:
    frames = case.tensor("frames_in")
    case.compare("preprocess_out", prepare(frames[:1]))
    height, width = frames.shape[1:3]
    scale = torch.tensor([width, height, width, height])
    boxes = (decode(case.tensor("loc"), priors(height, width)) * scale).numpy()
    scores = case.tensor("conf")[..., 1].numpy()
    blurred = frames.numpy().copy()
    for frame, corners, sure in zip(blurred, boxes, scores, strict=True):
        blur(frame, select(corners, sure))
    case.compare("frames_out", blurred)


class Recorded(RetinaFace):
    """A network whose output is that of the case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.recorded = case.tensor("loc"), case.tensor("conf")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(images) == len(self.recorded[0])
        return self.recorded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_filter(case: Case) -> None:
    frames = case.tensor("frames_in").numpy()
    before = frames.copy()
    with torch.device("cpu"):
        blurred, count = FaceBlur(Recorded(case)).apply(frames)
    case.compare("frames_out", blurred)
    assert (count > 0) == bool((blurred != before).any())
    assert np.array_equal(frames, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
