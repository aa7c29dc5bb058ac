"""Golden cases `ar_video_io`: media to the conditioning tensor, resize and crop, frames to uint8.

The `batches` of a case are about the pipeline's numbering and are tested with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import REPOSITORY, Case, cases
from torch import Tensor

from worldline.errors import InputError
from worldline.inputs import read_clip
from worldline.video.convert import condition_frames, resize_and_crop, to_uint8
from worldline.video.read import Clip, media_kind, probe

CASES = cases("ar_video_io")

# What the released 4B to 13B models take, unless the case says otherwise.
RELEASED_SHAPE = (33, 640, 1024)


def target(case: Case) -> tuple[int, int, int]:
    """Read (frames, height, width) from the words beside the stored samples."""
    for line in case.spec["tensors"].values():
        if found := re.search(r"\[1,\s*3,\s*(\d+),\s*(\d+),\s*(\d+)\] conditioning", line):
            frames, height, width = map(int, found.groups())
            return frames, height, width
    return RELEASED_SHAPE


def media_path(case: Case, load: dict[str, Any]) -> Path | None:
    """Find an input beside the case, or among the public assets; None where those are absent."""
    for folder in (case.path, case.path.parent.parent, REPOSITORY.parent / "shared"):
        if (folder / load["path"]).is_file():
            return folder / load["path"]
    assert load["path"].startswith("assets/"), f"{case}: {load['path']} is missing"
    return None


def load_media(path: Path, load: dict[str, Any]) -> Clip:
    info = probe(path)
    clip = read_clip(path, load["input_type"].removeprefix("text_and_"), load["num_input_frames"])
    assert clip.frames.shape[1:3] == (info.height, info.width)
    return clip


def indices(text: str) -> tuple[Any, ...]:
    """Turn the words "[:, [0, 8], 312:328, ::16]" of case.json into an index."""
    parts = re.findall(r"\[[^\[\]]*\]|[^,\[\]\s]+", text.strip()[1:-1])
    return tuple(
        [int(i) for i in part[1:-1].split(",")]
        if part.startswith("[")
        else slice(*(int(i) if i else None for i in part.split(":")))
        for part in parts
    )


def sample(case: Case, name: str, video: Tensor) -> Tensor:
    """Take from a (3, T, H, W) video what the stored tensor of this name holds of it."""
    if name.endswith(".mean_min_max"):
        figures = [video.mean((2, 3)), video.amin((2, 3)), video.amax((2, 3))]  # (3, T) each
        return torch.stack(figures, dim=-1).transpose(0, 1)
    found = re.search(r"tensor\[0\](\[.*?\])(?: of |$)", case.spec["tensors"][name])
    assert found, f"{case}: case.json does not say what {name} is"
    return video[indices(found.group(1))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads(case: Case) -> None:
    frames, height, width = target(case)
    for load in case.spec["loads"]:
        path = media_path(case, load)
        names = case.names(f"{load['key']}.*")
        if path is None:
            for name in names:  # compared where the public assets are at hand
                case.used.add(name)
            continue
        if not names:
            continue  # the reference gave up: see test_what_the_reference_drops
        clip = load_media(path, load)
        video = condition_frames(clip, load["num_input_frames"], frames, height, width)
        for name in names:
            case.compare(name, sample(case, name, video[0]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_reference_drops(case: Case) -> None:
    """Ours reads upper-case names, and says why it cannot read the others."""
    frames, height, width = target(case)
    for load in case.spec["loads"]:
        path = media_path(case, load)
        if path is None or load["returned_keys"]:
            continue
        if media_kind(path) != load["input_type"].removeprefix("text_and_"):
            with pytest.raises(InputError, match="give input_type="):
                load_media(path, load)
            continue
        count, wanted = probe(path).frames, load["num_input_frames"]
        if count < wanted:
            with pytest.raises(InputError, match=f"has {count} frames, .* {wanted};"):
                load_media(path, load)
        else:
            video = condition_frames(load_media(path, load), wanted, frames, height, width)
            assert video.shape == (1, 3, frames, height, width)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resize_and_crop(case: Case) -> None:
    for name in case.names("resize*.in"):
        stored = name.removesuffix("in") + "out"
        height, width = case.tensor(stored).shape[-2:]
        case.compare(stored, resize_and_crop(case.tensor(name), height, width))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_to_uint8(case: Case) -> None:
    for name in case.names("save*.in"):
        case.compare(name.removesuffix("in") + "out", to_uint8(case.tensor(name)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
