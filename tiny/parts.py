"""The data that the other modules of the folder share: a scene, and the background behind it.

Axes: N objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Background:
    """A wall, and a floor below it, each a colour gradient and a coarse faint texture.

    Colours are (3,) in 0 to 255; lengths in picture heights; amplitudes in grey levels.
    """

    wall_texture: str
    floor_texture: str
    wall_colours: Floats  # (2, 3), at the two ends of the gradient
    floor_colour: Floats
    gradient: float  # direction, radians
    periods: tuple[float, float]  # wall, floor
    amplitudes: tuple[float, float]
    phase: float
    tilt: float  # of stripes, radians
    grid: Floats  # GRID, -1 to 1, the corners of value noise


@dataclass(frozen=True)
class Scene:
    """Everything that fixes a clip apart from its size and length."""

    seed: int
    kind: str
    aspect: float  # width over height
    shapes: tuple[str, ...]  # the first object is the caption's subject
    colours: tuple[str, ...]
    radii: Floats  # (N,), of the discs that collide, in picture heights
    masses: Floats
    state: Floats  # (6, N): x, y, velocity_x, velocity_y, angle, spin
    marks: (
        Floats  # (N,), 0 a stripe, 1 a dot; drawn on balls, whose turning would not show otherwise
    )
    gravity: float
    drag: float
    restitution: float
    friction: float
    left: float
    right: float
    top: float
    bottom: float
    floor: float  # where the floor begins in the picture, in heights; 1 or more where there is none
    light: float  # direction towards the light, radians
    brightness: float
    pan: float  # heights that the picture moves to the left in a second
    background: Background
    caption: str

    @property
    def num_objects(self) -> int:
        return len(self.shapes)
