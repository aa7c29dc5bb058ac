"""The laws that hold whatever the scene: energy, momentum, walls, rolling without slip."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from tiny.motion import INERTIA, Bodies, Motion, integrate
from tiny.scenes import draw_scenes

SCENES = draw_scenes(range(60))
BODIES = SCENES.bodies


def energy(bodies: Bodies, motion: Motion) -> np.ndarray:
    """Kinetic, rotational and potential energy of whole clips, (B, T)."""
    mass, radius = bodies.mass.T[:, None], bodies.radius.T[:, None]
    speed = motion.velocity_x**2 + motion.velocity_y**2
    moving = 0.5 * mass * (speed + INERTIA * (radius * motion.spin) ** 2)
    height = 1.0 - motion.y  # y points down
    falling = mass * bodies.gravity[:, None, None] * height
    return ((moving + falling) * (radius > 0)).sum(axis=2)


def one_clip(**changes: object) -> Bodies:
    """Two bodies without gravity in a large box; `changes` are rows of numbers."""
    numbers: dict[str, list[float]] = {
        "x": [1.0, 2.0],
        "y": [1.0, 1.05],
        "velocity_x": [1.0, -0.5],
        "velocity_y": [0.0, 0.1],
        "angle": [0.0, 0.0],
        "spin": [2.0, -1.0],
        "radius": [0.15, 0.2],
        "mass": [1.0, 3.0],
        "gravity": [0.0],
        "drag": [0.0],
        "restitution": [1.0],
        "friction": [0.0],
        "left": [0.0],
        "right": [9.0],
        "top": [0.0],
        "bottom": [9.0],
    }
    numbers.update(changes)  # type: ignore[arg-type]
    arrays = {name: np.array(values, dtype=np.float64) for name, values in numbers.items()}
    return Bodies(**{n: a[:, None] if len(a) == 2 else a for n, a in arrays.items()})


def test_energy_never_grows() -> None:
    total = energy(BODIES, integrate(BODIES, 60))
    scale = np.abs(total[:, :1])
    assert (np.diff(total, axis=1) <= 0.005 * scale).all()
    assert (total <= 1.005 * total[:, :1]).all()


def test_bodies_stay_inside_the_walls() -> None:
    motion = integrate(BODIES, 60)
    radius = BODIES.radius.T[:, None]  # (B, 1, N)
    left, right, top, bottom = (
        wall[:, None, None] for wall in (BODIES.left, BODIES.right, BODIES.top, BODIES.bottom)
    )
    inside = (motion.x >= left + radius - 1e-9) & (motion.x <= right - radius + 1e-9)
    inside &= (motion.y >= top + radius - 1e-9) & (motion.y <= bottom - radius + 1e-9)
    assert (inside | (radius == 0)).all()


@pytest.mark.parametrize(("restitution", "friction"), [(1.0, 0.0), (0.6, 0.0), (0.8, 0.4)])
def test_a_collision_conserves_momentum_and_loses_no_energy_if_elastic(
    restitution: float, friction: float
) -> None:
    bodies = one_clip(restitution=[restitution], friction=[friction])
    motion = integrate(bodies, 20)
    mass = bodies.mass[:, 0]
    momentum_x = (motion.velocity_x[0] * mass).sum(axis=1)
    momentum_y = (motion.velocity_y[0] * mass).sum(axis=1)
    np.testing.assert_allclose(momentum_x, momentum_x[0], atol=1e-12)
    np.testing.assert_allclose(momentum_y, momentum_y[0], atol=1e-12)
    assert motion.velocity_x[0, -1, 0] < 0 < motion.velocity_x[0, 0, 0]  # they did collide
    orbital = mass * (motion.x[0] * motion.velocity_y[0] - motion.y[0] * motion.velocity_x[0])
    own = INERTIA * mass * bodies.radius[:, 0] ** 2 * motion.spin[0]
    # Putting overlapping bodies apart moves the point of contact by under a hundredth of a height.
    angular = (orbital + own).sum(axis=1)
    np.testing.assert_allclose(angular, angular[0], atol=0.05)
    total = energy(bodies, motion)[0]
    if restitution == 1.0:
        np.testing.assert_allclose(total, total[0], rtol=1e-12)
    else:
        assert total[-1] < total[0]


def test_free_fall_is_the_parabola() -> None:
    bodies = one_clip(gravity=[3.0], velocity_x=[0.1, 0.2], bottom=[99.0])
    motion = integrate(bodies, 33)
    seconds = np.arange(33) / 25
    np.testing.assert_allclose(motion.y[0, :, 0], 1.0 + 1.5 * seconds**2, rtol=1e-12)
    np.testing.assert_allclose(motion.x[0, :, 0], 1.0 + 0.1 * seconds, rtol=1e-12)


def test_an_elastic_ball_comes_back_to_its_height() -> None:
    bodies = one_clip(
        gravity=[3.0], y=[0.5, 0.5], velocity_x=[0.0, 0.0], velocity_y=[0.0, 0.0], bottom=[1.0]
    )
    motion = integrate(bodies, 200)
    # The top is passed between two frames at most 1/50 s away: 0.5 * 3 / 50^2 heights.
    assert motion.y[0, 30:, 0].min() == pytest.approx(0.5, abs=1e-3)


def test_friction_makes_a_sliding_ball_roll() -> None:
    bodies = one_clip(
        gravity=[3.0],
        y=[0.85, 0.8],
        x=[1.0, 5.0],
        velocity_x=[1.0, 0.0],
        velocity_y=[0.0, 0.0],
        spin=[0.0, 0.0],
        restitution=[0.5],
        friction=[0.3],
        bottom=[1.0],
    )
    motion = integrate(bodies, 40)
    # A disc that slides with v ends rolling with v / (1 + inertia).
    assert motion.velocity_x[0, -1, 0] == pytest.approx(1 / (1 + INERTIA), rel=1e-6)
    assert motion.spin[0, -1, 0] == pytest.approx(motion.velocity_x[0, -1, 0] / 0.15, rel=1e-6)


def test_a_clip_does_not_depend_on_its_neighbours_or_its_length() -> None:
    together = integrate(BODIES, 33)
    for clip in (0, 7, 31):
        alone = integrate(BODIES[[clip]], 20)
        for one, all_of_them in zip(alone, together, strict=True):
            assert np.array_equal(one[0], all_of_them[clip, :20])


def test_joined_records_are_the_parts() -> None:
    joined = type(SCENES).join([SCENES[:7], SCENES[7:]])
    assert len(joined) == len(SCENES) == 60
    np.testing.assert_equal(asdict(joined), asdict(SCENES))


def test_a_body_at_rest_stays_at_rest_without_gravity() -> None:
    still = BODIES[[0]]
    zero = dict.fromkeys(("velocity_x", "velocity_y", "spin"), 0 * still.x)
    motion = integrate(replace(still, gravity=0 * still.gravity, **zero), 10)
    present = still.radius[:, 0] > 0
    assert np.ptp(motion.x[..., present], axis=1).max() < 1e-12
    assert np.ptp(motion.y[..., present], axis=1).max() < 1e-12
