"""Finding and hiding faces, where the right answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.errors import CheckpointError, Error
from worldline.guardrails.faces import (
    FaceBlur,
    RetinaFace,
    blur,
    decode,
    key_map,
    pixelate,
    priors,
    select,
)
from worldline.weights.networks import read_network

from .networks import write_retinaface

MANIFEST = Path(__file__).parents[1] / "keys" / "RetinaFace-Resnet50_Final.json"


def test_released_keys() -> None:
    stated = json.loads(MANIFEST.read_text())
    with torch.device("meta"):
        network = RetinaFace()
    keys = key_map(network)
    ours = {keys.released(name): list(t.shape) for name, t in network.state_dict().items()}
    released = {name: shape for name, (_, shape) in stated["tensors"].items()}
    assert ours == released
    assert {keys.ours(name) for name in released} == set(network.state_dict())


def test_no_correction_gives_the_priors() -> None:
    fixed = priors(48, 64)
    assert len(fixed) == 2 * (6 * 8 + 3 * 4 + 2 * 2)
    corners = decode(torch.zeros(1, len(fixed), 4), fixed)[0]
    torch.testing.assert_close((corners[:, :2] + corners[:, 2:]) / 2, fixed[:, :2])
    torch.testing.assert_close(corners[:, 2:] - corners[:, :2], fixed[:, 2:])


def test_select_keeps_the_surest_of_those_that_overlap() -> None:
    boxes = np.array([[0, 0, 9, 9], [1, 0, 10, 9], [50, 50, 59, 59], [0, 0, 99, 99]], np.float32)
    scores = np.array([0.8, 0.9, 0.71, 0.7], np.float32)
    assert select(boxes, scores).tolist() == [boxes[1].tolist(), boxes[2].tolist()]
    assert len(select(boxes, scores, keep=1)) == 1
    assert select(boxes[:0], scores[:0]).shape == (0, 4)


def test_pixelate_makes_squares_of_one_colour() -> None:
    region = np.random.RandomState(0).randint(0, 256, (40, 30, 3), np.uint8)
    squares = pixelate(region).reshape(5, 8, 5, 6, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    flat = np.full((33, 21, 3), 77, np.uint8)
    assert (pixelate(flat) == flat).all()


@pytest.mark.parametrize("side", [245, 490, 515, 535])
def test_blocks_begin_where_rounding_puts_them(side: int) -> None:
    """A fifth of these times its rounded reciprocal is less than 1: OpenCV is a pixel late."""
    fifth = side // 5
    assert int(fifth * (1 / fifth)) == 0
    column = np.repeat(np.arange(5, dtype=np.uint8) * 50, fifth)
    frame = np.repeat(column[:, None, None], 3, 2).repeat(25, 1)
    blocks = pixelate(frame)[:, 0, 0].astype(int)
    assert np.flatnonzero(np.diff(blocks))[0] + 1 == fifth + 1
    assert np.array_equal(pixelate(frame.transpose(1, 0, 2))[0, :, 0], blocks)


def test_blur_clips_and_leaves_small_boxes() -> None:
    frame = np.random.RandomState(0).randint(0, 256, (64, 80, 3), np.uint8)
    before = frame.copy()
    small, outside = [0, 0, 19.9, 40], [100, 100, 140, 140]
    assert blur(frame, np.array([small, outside])) == 0
    assert (frame == before).all()
    assert blur(frame, np.array([[-10.0, -10.0, 30.0, 30.0]])) == 1
    assert (frame[30:] == before[30:]).all()
    assert (frame[:, 30:] == before[:, 30:]).all()
    assert (frame[:30, :30] != before[:30, :30]).any()


def test_strict_file_and_finite_numbers(tmp_path: Path) -> None:
    path = write_retinaface(tmp_path / "Resnet50_Final.pth")
    state = torch.load(path, weights_only=True)
    torch.save({"state_dict": state}, path)  # also saved like this
    guard = FaceBlur(read_network(RetinaFace, path, key_map))
    frames = np.zeros((1, 32, 48, 3), np.uint8)
    assert guard.apply(frames)[0].shape == frames.shape
    with torch.no_grad():
        guard.network.BboxHead[0].conv1x1.bias.fill_(torch.inf)
    with pytest.raises(Error, match="not finite"):
        guard.apply(frames)
    state["module.fpn.stranger"] = state.pop("module.fpn.merge1.0.weight")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"fpn\.merge1\.0\.weight"):
        read_network(RetinaFace, path, key_map)
    with pytest.raises(CheckpointError, match="missing"):
        read_network(RetinaFace, tmp_path / "absent.pth", key_map)
