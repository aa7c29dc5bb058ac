"""What a seed promises: the same scene always, named in its caption, with enough motion."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from tiny.scenes import (
    COLOURS,
    KINDS,
    MAX_OBJECTS,
    OUTLINES,
    SHAPES,
    TEXTURES,
    Scene,
    draw_scene,
    draw_scenes,
)
from worldline.errors import InputError

SCENES = draw_scenes(range(200))


def same(first: Scene, second: Scene) -> bool:
    """Whether two scenes are equal to the last bit."""
    np.testing.assert_equal(asdict(first), asdict(second))
    return True


def test_a_scene_depends_on_its_seed_alone() -> None:
    for seed in (0, 3, 199):
        assert same(draw_scene(seed), SCENES[seed])
    for scene, again in zip(
        draw_scenes([5, 150, 2]), (SCENES[s] for s in (5, 150, 2)), strict=True
    ):
        assert same(scene, again)


def test_drawing_leaves_the_global_generator_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    draw_scene(4)
    assert np.array_equal(before, np.random.get_state()[1])


def test_scenes_are_varied() -> None:
    assert {scene.kind for scene in SCENES} == set(KINDS)
    assert {scene.num_objects for scene in SCENES} == set(range(2, MAX_OBJECTS + 1))
    pairs = {(s.colours[0], s.shapes[0]) for s in draw_scenes(range(400))}
    assert pairs == {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert {scene.background.wall_texture for scene in SCENES} == set(TEXTURES)


def test_captions_name_the_objects_and_what_the_first_does() -> None:
    verbs = {
        "drop": "falls",
        "throw": "thrown",
        "roll": "rolls",
        "meet": "flies",
        "billiards": "slides",
    }
    for scene in SCENES:
        first = scene.caption.split(",")[0]
        assert f"{scene.colours[0]} {scene.shapes[0]} " in first
        assert verbs[scene.kind] in first
        for colour, shape in zip(scene.colours, scene.shapes, strict=True):
            assert f"{colour} {shape}" in scene.caption
        side = "right" if scene.state[2, 0] > 0 else "left"
        assert f"to the {side}" in scene.caption
        assert " a orange" not in scene.caption.lower()


def test_objects_start_apart_in_different_colours() -> None:
    for scene in SCENES:
        assert len(set(scene.colours)) == scene.num_objects
        x, y = scene.state[:2]
        for i in range(scene.num_objects):
            for j in range(i):
                reach = scene.radii[i] + scene.radii[j]
                assert np.hypot(x[i] - x[j], y[i] - y[j]) >= reach


def test_colours_are_well_separated() -> None:
    values = np.array(list(COLOURS.values()), dtype=float)
    apart = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert apart[~np.eye(len(values), dtype=bool)].min() > 75


def test_areas_of_the_outlines_are_those_of_their_corners() -> None:
    for outline in OUTLINES.values():
        ring = np.arange(2 * outline.corners)
        radius = np.where(ring % 2, outline.inner, outline.outer)
        angle = np.pi * ring / outline.corners
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        flat = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
        edge = np.hypot(x - np.roll(x, -1), y - np.roll(y, -1)).sum()
        # Exact for convex shapes; the notches of a star lose a little of the border.
        grown = flat + edge * outline.rounding + np.pi * outline.rounding**2
        assert outline.area == pytest.approx(grown, rel=0.03)


def test_bad_seeds_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="seed -1"):
        draw_scene(-1)
    with pytest.raises(InputError, match=r"is 0\.50; physics scenes"):
        draw_scene(0, aspect=0.5)
