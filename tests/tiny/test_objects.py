"""Objects are found by colour and shape, whatever a generative model does to sharpness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from tiny.clips import make_clips
from tiny.objects import Verdict, compare, find_objects, named_objects
from tiny.scenes import COLOURS, SHAPES, draw_scenes

SEEDS = range(1_100_000, 1_100_012)


@pytest.fixture(scope="module")
def truth() -> list[tuple[np.ndarray, str]]:
    clips = make_clips(SEEDS)
    return list(zip(clips.frames.numpy(), clips.captions, strict=True))


def shows(frames: np.ndarray | torch.Tensor, caption: str) -> Verdict:
    return compare(find_objects(frames), caption)


def blurred(frames: np.ndarray, factor: int = 3) -> np.ndarray:
    """Reduce and enlarge again: what a small decoder leaves of edges and corners."""
    height, width = frames.shape[1:3]
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    small = functional.interpolate(pictures, size=(height // factor, width // factor), mode="area")
    large = functional.interpolate(small, size=(height, width), mode="bilinear")
    return large.round().byte().permute(0, 2, 3, 1).numpy()


def wrong_colours(frames: np.ndarray) -> np.ndarray:
    """Duller by a fifth, a little green, and brighter in the shadows."""
    grey = frames.mean(-1, keepdims=True)
    dull = grey + 0.8 * (frames - grey)
    return (dull * (0.95, 1.04, 0.95) + (4, 0, 6)).clip(0, 255).astype(np.uint8)


def picture(colour: str, corners: np.ndarray) -> np.ndarray:
    """A still clip of one polygon before a grey wall."""
    y, x = np.mgrid[:128, :192]
    inside = np.ones(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    frame = np.full((128, 192, 3), 130, np.uint8)
    frame[inside] = COLOURS[colour]
    return frame[None].repeat(9, 0)


def regular(corners: int, turn: float, radius: float = 20) -> np.ndarray:
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return np.stack([90 + radius * np.cos(angles), 60 + radius * np.sin(angles)], axis=1)


@pytest.mark.parametrize(
    "damage", [np.copy, blurred, wrong_colours], ids=["as rendered", "blurred", "wrong colours"]
)
def test_every_object_of_true_clips_is_found(truth, damage) -> None:
    for frames, caption in truth:
        found = {(item.colour, item.shape) for item in find_objects(damage(frames))}
        assert found == set(named_objects(caption)), caption


def test_a_caption_of_another_clip_rarely_passes(truth) -> None:
    objects = [find_objects(frames) for frames, _ in truth]
    passed = [
        compare(found, caption).passed
        for place, found in enumerate(objects)
        for other, (_, caption) in enumerate(truth)
        if other != place
    ]
    assert np.mean(passed) <= 0.05


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("turn", [0.0, 0.4])
def test_colour_and_corners_are_found_at_any_rotation(colour: str, turn: float) -> None:
    for corners, shape in ((3, "triangle"), (4, "box"), (40, "ball")):
        (found,) = find_objects(picture(colour, regular(corners, turn)))
        assert (found.colour, found.shape, found.frames) == (colour, shape, 1.0)


def test_an_object_without_motion_counts(truth) -> None:
    frames, caption = truth[0]
    assert shows(frames[:1].repeat(9, 0), caption).passed
    assert shows(frames[:1], caption).passed


def test_the_size_of_a_video_does_not_matter(truth) -> None:
    frames, caption = truth[1]
    assert shows(frames[::8].repeat(3, 1).repeat(3, 2), caption).passed
    assert shows(torch.from_numpy(frames[:, ::2, ::2]), caption).passed


def test_each_part_of_the_caption_is_needed(truth) -> None:
    frames, caption = next((f, c) for f, c in truth if len(named_objects(c)) == 2)
    (colour, shape), (other, _) = named_objects(caption)
    absent = next(name for name in COLOURS if name not in (colour, other))
    wrong = next(name for name in SHAPES if name != shape)
    assert shows(frames, f"A {colour} {shape} with a {other} ball.").passed
    verdict = shows(frames, f"A {colour} {wrong} with a {other} ball.")
    assert not verdict.subject_found
    assert verdict.companions_colours_found
    assert not verdict.passed
    verdict = shows(frames, f"A {colour} {shape} with a {absent} ball.")
    assert verdict.subject_found
    assert not verdict.companions_colours_found
    assert not verdict.passed


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_patch_of_colour_is_no_object(share: float) -> None:
    clip = np.full((9, 128, 192, 3), 130, np.uint8)
    clip[:, :, : round(share * 192)] = COLOURS["red"]
    assert find_objects(clip) == []


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_noise_is_no_object(cell: int) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (9, 128 // cell, 192 // cell, 3))
    assert find_objects(noise.repeat(cell, 1).repeat(cell, 2).astype(np.uint8)) == []


def test_an_object_of_a_few_frames_does_not_count() -> None:
    clip = picture("red", regular(4, 0.2))
    clip[4:] = 130
    assert find_objects(clip) == []


def test_a_mark_on_a_ball_is_no_object() -> None:
    clip = picture("red", regular(40, 0.0))
    _, x = np.mgrid[:128, :192]
    clip[:, (clip[0, ..., 0] != 130) & (np.abs(x - 90) < 5)] = (240, 236, 228)
    (found,) = find_objects(clip)
    assert (found.colour, found.shape) == ("red", "ball")


def test_a_caption_names_its_objects_in_order() -> None:
    scenes = draw_scenes(range(50))
    for clip, caption in enumerate(scenes.captions):
        assert named_objects(caption) == scenes.objects(clip)
