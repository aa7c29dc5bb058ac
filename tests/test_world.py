"""The Python interface of the README, on the small world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline.video.read import read_image, read_video

from .conftest import MODEL, moving


@pytest.fixture(scope="module")
def world(small_world: Path) -> worldline.World:
    return worldline.load(
        MODEL, small_world, disable_guardrail=True, disable_diffusion_decoder=True
    )


def test_generate_and_save(world: worldline.World, clip: Path, tmp_path: Path) -> None:
    video = world.generate(clip, seed=1, top_p=0.9, temperature=0.7, num_input_frames=9)
    assert isinstance(video, worldline.Video)
    assert video.frames.shape == (33, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.fps == 25
    path = video.save(tmp_path / "new" / "out.mp4")
    assert len(read_video(path).frames) == 33
    report = json.loads(path.with_suffix(".json").read_text())
    assert report == video.report
    assert report["request"]["temperature"] == 0.7


def test_every_form_of_input(world: worldline.World, clip: Path, image: Path) -> None:
    frames = read_video(clip).frames
    from_file = world.generate(str(clip)).frames
    for form in (clip, frames, torch.from_numpy(frames)):
        assert np.array_equal(world.generate(form).frames, from_file)
    picture = read_image(image).frames
    from_image = world.generate(image).frames
    assert np.array_equal(world.generate(Image.fromarray(picture[0])).frames, from_image)
    one_frame = world.generate(frames, num_input_frames=1).report
    assert one_frame["tokens"] == 24


def test_only_the_last_frames_count(world: worldline.World) -> None:
    frames = moving(20)
    changed = frames.copy()
    changed[:11] = 0
    assert np.array_equal(world.generate(frames).frames, world.generate(changed).frames)


def test_same_seed_same_video(world: worldline.World, clip: Path) -> None:
    first, again, other = (world.generate(clip, seed=seed, top_p=1.0).frames for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stream(world: worldline.World, clip: Path) -> None:
    steps = list(world.stream(clip))
    assert all(isinstance(step, worldline.Step) for step in steps)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["encode", "tokens", "decode", "done"]
    tokens = [step for step in steps if step.kind == "tokens"]
    assert [step.done for step in tokens] == list(range(1, 19))
    assert {step.total for step in tokens} == {18}
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].frames is steps[-1].video.frames  # type: ignore[union-attr]


def test_a_stream_may_be_left(world: worldline.World, clip: Path) -> None:
    whole = world.generate(clip).frames
    steps = world.stream(clip)
    for step in steps:
        if step.kind == "tokens":
            break
    del steps
    assert np.array_equal(world.generate(clip).frames, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"num_input_frames": 5}, "num_input_frames is 5"),
        ({"num_frames": 5}, "unknown option num_frames"),
        ({"input_type": "image"}, "is a video, but the input type is image"),
    ],
)
def test_wrong_options(
    options: dict[str, object], message: str, world: worldline.World, clip: Path
) -> None:
    with pytest.raises(worldline.InputError, match=message):
        world.generate(clip, **options)


def test_wrong_inputs(world: worldline.World, short_clip: Path) -> None:
    with pytest.raises(worldline.InputError, match="has 5 frames"):
        world.generate(short_clip)
    with pytest.raises(worldline.InputError, match="has 3 frames"):
        world.generate(moving(3))
    with pytest.raises(worldline.InputError, match=r"uint8 \(T, H, W, 3\)"):
        world.generate(moving(9).astype(np.float32))


def test_load_twice(small_world: Path) -> None:
    """The function is still the function once its modules are imported."""
    for _ in range(2):
        loaded = worldline.load(
            small_world / MODEL, disable_guardrail=True, disable_diffusion_decoder=True
        )
        assert loaded.name == MODEL
    assert callable(worldline.load)


def test_released_parts_are_refused_by_name(small_world: Path) -> None:
    with pytest.raises(worldline.InputError, match="disable_guardrail=True"):
        worldline.load(MODEL, small_world, disable_diffusion_decoder=True)
