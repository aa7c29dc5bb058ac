"""Rigid bodies in the plane: gravity, walls, impulses between circles, Coulomb friction.

Every body collides as a disc with the inertia of one, whatever is drawn for it. One step moves the
bodies on exact parabolas and then resolves contacts by impulses, so energy never grows in free
flight or in a collision. Lengths are picture heights, x to the right and y DOWN as in an image; a
positive angle turns clockwise on screen. Axes: N bodies, B clips, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FPS = 25.0
SUBSTEPS = 4  # a frame; at 2 heights a second a body moves a sixth of the smallest radius in one
INERTIA = 0.5  # of a disc, in units of mass * radius^2


@dataclass(frozen=True)
class ClipArrays:
    """Base of records of arrays whose last axis is that of clips."""

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(next(iter(self._values().values())))

    def __getitem__(self, clips: slice | Sequence[int] | NDArray[np.intp]) -> Self:
        parts = {
            name: value[clips] if isinstance(value, ClipArrays) else value[..., clips]
            for name, value in self._values().items()
        }
        return type(self)(**parts)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Records one after the other."""
        columns = {name: [part._values()[name] for part in parts] for name in parts[0]._values()}
        return cls(
            **{
                name: type(values[0]).join(values)
                if isinstance(values[0], ClipArrays)
                else np.concatenate(values, axis=-1)
                for name, values in columns.items()
            }
        )


@dataclass(frozen=True)
class Bodies(ClipArrays):
    """The start of B clips of N bodies each.

    Arrays of bodies are (N, B), those of clips (B,). A radius of 0 marks a place without a body.
    """

    gravity: Floats  # heights a second squared, downwards
    drag: Floats  # 1 / second, the share of velocity that a table seen from above takes
    restitution: Floats  # 0 to 1
    friction: Floats  # Coulomb's coefficient
    left: Floats  # the walls, which no disc crosses
    right: Floats
    top: Floats
    bottom: Floats
    x: Floats
    y: Floats
    velocity_x: Floats  # heights a second
    velocity_y: Floats
    angle: Floats  # radians
    spin: Floats  # radians a second
    radius: Floats
    mass: Floats


class Motion(NamedTuple):
    """Where the bodies are in each frame: float64 arrays of (B, T, N)."""

    x: Floats
    y: Floats
    angle: Floats
    velocity_x: Floats
    velocity_y: Floats
    spin: Floats


def integrate(bodies: Bodies, frames: int) -> Motion:
    """Motion of `bodies` through `frames` frames, each clip alone; frame 0 is the start itself."""
    start = (bodies.x, bodies.y, bodies.angle, bodies.velocity_x, bodies.velocity_y, bodies.spin)
    # its views are changed in place, so rows of clips must lie in a row
    state = np.ascontiguousarray(np.stack(start))
    track = np.empty((frames, *state.shape))
    track[0] = state
    solver = _Solver(bodies, state, 1.0 / (FPS * SUBSTEPS))
    for frame in range(1, frames):
        for _ in range(SUBSTEPS):
            solver.step()
        track[frame] = state
    return Motion(*track.transpose(1, 3, 0, 2))


class _Solver:
    """The state of a batch and what each substep needs, computed once."""

    def __init__(self, bodies: Bodies, state: Floats, seconds: float) -> None:
        self.bodies = bodies
        self.state = state
        self.seconds = seconds
        num_bodies, num_clips = bodies.x.shape
        self.first, self.second = np.triu_indices(num_bodies, 1)
        present = (bodies.radius[self.first] > 0) & (bodies.radius[self.second] > 0)
        reach = (bodies.radius[self.first] + bodies.radius[self.second]) * present
        self.reach_squared = reach**2  # 0 where a body is absent: such a pair never touches
        self.fall = bodies.gravity * seconds
        self.keep = 1.0 - bodies.drag * seconds
        radius = np.maximum(bodies.radius, 1e-9)  # absent bodies must not divide by 0
        self.radius = radius.ravel()
        # Flat views, so that the few bodies in contact are picked with one index.
        self.flat = state.reshape(6, -1)
        self.clip = np.tile(np.arange(num_clips), num_bodies)
        # The discs' centres stay in a rectangle: its middle and half its size, along x and along y.
        self.middle = (0.5 * (bodies.left + bodies.right), 0.5 * (bodies.top + bodies.bottom))
        self.room = (
            0.5 * (bodies.right - bodies.left) - radius,
            0.5 * (bodies.bottom - bodies.top) - radius,
        )

    def step(self) -> None:
        position, velocity = self.state[:3], self.state[3:]
        position += velocity * self.seconds
        position[1] += 0.5 * self.seconds * self.fall
        velocity[1] += self.fall
        velocity *= self.keep
        self._collide_pairs()
        self._collide_walls(1)
        self._collide_walls(0)

    def _collide_pairs(self) -> None:
        x, y = self.state[0], self.state[1]
        dx = x[self.first] - x[self.second]
        dy = y[self.first] - y[self.second]
        touching = dx * dx + dy * dy < self.reach_squared
        # One pair after the other: simultaneous impulses on one body would create energy.
        for pair in touching.any(axis=1).nonzero()[0]:
            self._collide_pair(
                int(self.first[pair]), int(self.second[pair]), touching[pair].nonzero()[0]
            )

    def _collide_pair(self, first: int, second: int, clips: NDArray[np.intp]) -> None:
        state, bodies = self.state, self.bodies
        a, b = state[:, first, clips], state[:, second, clips]
        inverse_a, inverse_b = 1 / bodies.mass[first, clips], 1 / bodies.mass[second, clips]
        radius_a, radius_b = bodies.radius[first, clips], bodies.radius[second, clips]
        inverse = inverse_a + inverse_b
        dx, dy = a[0] - b[0], a[1] - b[1]
        distance = np.sqrt(dx * dx + dy * dy)
        safe = np.maximum(distance, 1e-9)
        # Two centres in one point have no direction; any will do.
        normal_x = np.where(distance > 1e-9, dx / safe, 1.0)
        normal_y = dy / safe
        # Moving both by inverse mass keeps the centre of mass, hence the pair's energy.
        overlap = np.maximum(radius_a + radius_b - distance, 0.0) / inverse
        a[0] += overlap * inverse_a * normal_x
        a[1] += overlap * inverse_a * normal_y
        b[0] -= overlap * inverse_b * normal_x
        b[1] -= overlap * inverse_b * normal_y

        relative_x, relative_y = a[3] - b[3], a[4] - b[4]
        closing = np.maximum(-(relative_x * normal_x + relative_y * normal_y), 0.0)
        bounce = (1 + bodies.restitution[clips]) * closing / inverse
        slip = relative_y * normal_x - relative_x * normal_y - a[5] * radius_a - b[5] * radius_b
        limit = bodies.friction[clips] * bounce
        rub = np.minimum(np.maximum(-slip / (inverse * (1 + 1 / INERTIA)), -limit), limit)
        impulse_x = bounce * normal_x - rub * normal_y
        impulse_y = bounce * normal_y + rub * normal_x
        a[3] += impulse_x * inverse_a
        a[4] += impulse_y * inverse_a
        b[3] -= impulse_x * inverse_b
        b[4] -= impulse_y * inverse_b
        a[5] -= rub * inverse_a / (INERTIA * radius_a)
        b[5] -= rub * inverse_b / (INERTIA * radius_b)
        state[:, first, clips], state[:, second, clips] = a, b

    def _collide_walls(self, axis: int) -> None:
        """Resolve contacts with the two walls that stop motion along x (0) or y (1)."""
        offset = self.state[axis] - self.middle[axis]
        depth = np.abs(offset) - self.room[axis]
        hit = (depth.ravel() > 0).nonzero()[0]
        if not hit.size:
            return
        bodies, clip, radius = self.bodies, self.clip[hit], self.radius[hit]
        direction = np.sign(offset.ravel()[hit])  # towards the wall: 1 is right, or down
        depth = depth.ravel()[hit]
        pull = bodies.gravity[clip] * direction * axis
        along, across, spin = self.flat[3 + axis], self.flat[4 - axis], self.flat[5]
        speed = along[hit] * direction
        # Putting the body back raises it against gravity: its speed pays for that energy.
        arrival = np.maximum(speed, 0.0)
        arrival = np.sqrt(np.maximum(arrival * arrival - 2 * pull * depth, 0.0))
        # Below this speed a bounce would not leave the wall within a few substeps: the body rests.
        resting = arrival < 4 * np.abs(pull) * self.seconds
        bounce = arrival * np.where(resting, 0.0, bodies.restitution[clip])
        # The direction turned by a quarter: (-1, 0) at the floor, (0, 1) at the right wall.
        tangent = direction * (1 - 2 * axis)
        slip = across[hit] * tangent + spin[hit] * radius
        limit = bodies.friction[clip] * (np.maximum(speed, 0.0) + bounce)
        rub = np.minimum(np.maximum(-slip / (1 + 1 / INERTIA), -limit), limit)
        self.flat[axis, hit] -= depth * direction
        # A body that is already leaving keeps its speed.
        along[hit] = np.where(speed < 0, speed, -bounce) * direction
        across[hit] += rub * tangent
        spin[hit] += rub / (INERTIA * radius)
