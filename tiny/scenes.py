"""What is in a clip: objects and their start, light, camera, background, and a sentence about it.

A scene is drawn from its seed alone, by rejection: a candidate whose motion, estimated without a
picture, would make "repeat the last input frame" too good or too poor a guess is drawn again.
Candidates of many seeds are simulated together, which changes nothing for any one of them.
Axes: N objects, B seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiny.motion import Bodies, Motion, integrate
from tiny.parts import Background, Floats, Scene
from worldline.errors import InputError

KINDS = ("drop", "throw", "roll", "meet", "billiards")
SHAPES = ("ball", "box", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 44, 44),
    "orange": (242, 138, 28),
    "yellow": (246, 216, 62),
    "green": (46, 158, 66),
    "cyan": (66, 206, 214),
    "blue": (44, 88, 212),
    "purple": (138, 52, 176),
    "white": (238, 238, 236),
}
TEXTURES = ("plain", "checker", "stripes", "bricks", "planks", "noise")
GRID = (5, 8)  # the corners of value noise over one picture: one to about 25 pixels

MAX_OBJECTS = 3
_TWO_OBJECTS = 0.75  # share of scenes with two; the others have three
MARGIN = 0.02  # heights between the walls and the picture's border


@dataclass(frozen=True)
class Outline:
    """A shape in units of its collision radius: a regular star polygon grown by `rounding`.

    A ball is a polygon of no size. `area` includes the rounding.
    """

    corners: int
    outer: float  # from the centre to a corner
    inner: float  # from the centre to the point between two corners
    rounding: float
    area: float


OUTLINES: dict[str, Outline] = {
    "ball": Outline(1, 0.0, 0.0, 1.0, 3.1416),
    "box": Outline(4, 0.8768, 0.62, 0.22, 2.7808),
    "triangle": Outline(3, 1.0, 0.5, 0.18, 2.3361),
    "star": Outline(5, 1.02, 0.58, 0.14, 2.64),
}

# Muted, of middle brightness: the bright objects stand out, and no texture costs a tokenizer much.
_WALLS = np.array(
    [
        (118, 132, 148),
        (158, 146, 124),
        (122, 142, 122),
        (138, 126, 148),
        (156, 130, 120),
        (116, 140, 144),
        (142, 142, 142),
        (104, 112, 132),
    ],
    dtype=np.float64,
)
_FLOORS = np.array(
    [(112, 92, 76), (92, 98, 108), (98, 112, 92), (124, 108, 92), (88, 84, 100), (120, 118, 114)],
    dtype=np.float64,
)
_TABLES = np.array(
    [
        (62, 116, 92),
        (78, 100, 132),
        (130, 96, 84),
        (104, 104, 112),
        (116, 108, 136),
        (134, 122, 98),
    ],
    dtype=np.float64,
)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
_AREAS = np.array([OUTLINES[shape].area for shape in SHAPES])

_NUM_UNIFORMS = 128  # a candidate's, spent in a fixed order
_ROUNDS = ((0, 1), (1, 4), (4, 24))  # candidates of a seed that are tried together
_NUM_CANDIDATES = _ROUNDS[-1][1]
_BAND = (15.7, 20.8)  # dB; the estimate is good to about half a dB
_TARGET = 18.2  # dB; the best candidate is taken where none lies in it
_INPUT_FRAMES = 9
_CHECK_FRAMES = 33
_BATCH = 2048  # seeds drawn together; 25 kB of uniform numbers each


def draw_scene(seed: int, aspect: float = 1.5) -> Scene:
    """Return the scene of `seed` (0 to 2^32 - 1) for pictures of `aspect` = width / height."""
    return draw_scenes([seed], aspect)[0]


def draw_scenes(seeds: Sequence[int], aspect: float = 1.5) -> list[Scene]:
    """Return the scene of each seed; the same as `draw_scene` one by one, and faster.

    Raises:
        InputError: a seed outside 0 to 2^32 - 1, or a picture too narrow or too wide for objects of
            these areas.
    """
    if not 1.0 <= aspect <= 2.5:
        raise InputError(f"width / height is {aspect:.2f}; physics scenes need 1 to 2.5")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed} is outside 0 to 2^32 - 1")
    scenes: list[Scene] = []
    for start in range(0, len(seeds), _BATCH):
        scenes += _draw_batch(seeds[start : start + _BATCH], aspect)
    return scenes


def _draw_batch(seeds: Sequence[int], aspect: float) -> list[Scene]:
    generator = np.random.RandomState()
    uniforms = np.empty((len(seeds), _NUM_CANDIDATES, _NUM_UNIFORMS))
    for row, seed in enumerate(seeds):
        generator.seed(int(seed))
        uniforms[row] = generator.random_sample((_NUM_CANDIDATES, _NUM_UNIFORMS))
    scenes: dict[int, Scene] = {}
    waiting = np.arange(len(seeds))
    # A simulation costs about the same for ten clips as for five hundred: few rounds, of more and
    # more candidates.
    for first, last in _ROUNDS:
        place = np.repeat(waiting, last - first)
        candidate = np.tile(np.arange(first, last), len(waiting))
        draft = _draft(uniforms[place, candidate], uniforms[place, 0], aspect)
        score = _still_psnr(draft, integrate(draft.bodies, _CHECK_FRAMES))
        miss = np.abs(score - _TARGET) + 100.0 * draft.crowded
        good = (score >= _BAND[0]) & (score <= _BAND[1]) & ~draft.crowded
        good = good.reshape(-1, last - first)
        if last == _NUM_CANDIDATES:  # none may be left over: the nearest one, if need be
            good[np.arange(len(good)), miss.reshape(good.shape).argmin(axis=1)] |= ~good.any(axis=1)
        found = np.asarray(good.any(axis=1))
        for entry in np.flatnonzero(found):
            column = int(entry * (last - first) + good[entry].argmax())
            clip = int(waiting[entry])
            scenes[clip] = _scene(draft, column, int(seeds[clip]))
        waiting = waiting[~found]
        if not waiting.size:
            break
    return [scenes[place] for place in range(len(seeds))]


@dataclass(frozen=True)
class _Draft:
    """Candidates of B seeds, before they are taken apart into scenes."""

    aspect: float
    kind: NDArray[np.intp]  # (B,)
    num_objects: NDArray[np.intp]
    shape: NDArray[np.intp]  # (N, B)
    colour: NDArray[np.intp]
    present: NDArray[np.bool_]
    crowded: NDArray[np.bool_]  # (B,), two objects overlap at the start
    bodies: Bodies
    marks: Floats
    floor: Floats
    light: Floats
    brightness: Floats
    pan: Floats
    wall_texture: NDArray[np.intp]
    floor_texture: NDArray[np.intp]
    wall_colours: Floats  # (B, 2, 3)
    floor_colour: Floats  # (B, 3)
    gradient: Floats
    periods: Floats  # (2, B)
    amplitudes: Floats  # (2, B)
    phase: Floats
    tilt: Floats
    grid: Floats  # (B, *GRID)


def _spend(uniforms: Floats) -> Iterator[Floats]:
    yield from uniforms.T


def _pick(uniform: Floats, count: int | NDArray[np.intp]) -> NDArray[np.intp]:
    return (uniform * count).astype(np.intp)


def _between(uniform: Floats, low: float | Floats, high: float | Floats) -> Floats:
    return low + (high - low) * uniform


def _draft(uniforms: Floats, first: Floats, aspect: float) -> _Draft:
    """Turn (B, _NUM_UNIFORMS) uniform numbers into scenes.

    Kind and number of objects come from the `first` candidate, so that rejection does not favour
    some kinds.
    """
    columns = _spend(uniforms)

    def one() -> Floats:
        return next(columns)

    def many(count: int = MAX_OBJECTS) -> Floats:
        return np.stack([next(columns) for _ in range(count)])

    many(2)  # where `first` has the kind and the number
    kind = _pick(first[:, 0], len(KINDS))
    num_objects = np.where(first[:, 1] < _TWO_OBJECTS, 2, 3)
    drop, throw, roll, meet, billiards = (kind == k for k in range(len(KINDS)))
    place = np.arange(MAX_OBJECTS)[:, None]
    present = place < num_objects

    shape = _pick(many(), len(SHAPES))
    colour = np.argsort(many(len(COLOURS)), axis=0)[:MAX_OBJECTS]
    # Two objects may be larger than three: about the same part of the picture moves.
    largest = np.choose(num_objects - 2, (0.048, 0.041))
    area = _between(many(), 0.026, largest) * aspect
    radius = np.sqrt(area / _AREAS[shape]) * present

    top_view = billiards
    floor = np.where(top_view, 1.5, _between(one(), 0.86, 0.92))
    left, right, top = MARGIN, aspect - MARGIN, MARGIN
    # A floor is seen from slightly above: objects stand a little below its far edge.
    bottom = np.where(top_view, 1.0 - MARGIN, np.minimum(floor + 0.05, 1.0 - MARGIN))

    # One column of the picture an object, in random order: no two start in the same place.
    order = np.argsort(np.where(present, many(), 2.0), axis=0)
    column = np.argsort(order, axis=0)
    wide = (right - left) / num_objects
    x = left + (column + 0.5) * wide + (many() - 0.5) * np.maximum(wide - 2.3 * radius, 0.0)
    x = np.clip(x, left + radius, right - radius)
    side = np.where(x < aspect / 2, 1.0, -1.0)  # towards the middle

    height, speed, direction, turn = many(), many(), many(), many()
    y = np.select(
        [drop, throw, meet, billiards],
        [
            _between(height, 0.17, 0.45),
            _between(height, 0.5, 0.72),
            _between(height, 0.3, 0.62),
            _between(height, 0.18, 0.82),
        ],
        default=np.where(place < 2, 1.0, _between(height, 0.16, 0.34)),
    )
    y = np.clip(y, top + radius, bottom - radius)
    heading = 2 * np.pi * direction
    flip = np.where(direction < 0.5, -1.0, 1.0)
    rolling = roll & (place < 2)
    velocity_x = np.select(
        [drop, throw, meet, billiards],
        [
            flip * _between(speed, 0.1, 0.6),
            side * _between(speed, 0.35, 1.0),
            side * _between(speed, 0.55, 1.1),
            np.cos(heading) * _between(speed, 0.7, 1.4),
        ],
        default=np.where(rolling, side, flip * 0.4) * _between(speed, 0.6, 1.3),
    )
    velocity_y = np.select(
        [drop, throw, meet, billiards],
        [
            _between(turn, -0.1, 0.4),
            -_between(turn, 0.9, 1.5),
            -_between(turn, 0.2, 0.6),
            np.sin(heading) * _between(speed, 0.7, 1.4),
        ],
        default=np.where(rolling, 0.0, 0.2),
    )
    spin = np.where(rolling, velocity_x / np.maximum(radius, 1e-9), (many() - 0.5) * 5.0)
    angle = 2 * np.pi * many()
    gravity = np.select([throw, meet, billiards], [2.6, 1.4, 0.0], default=2.8)
    gravity = gravity * _between(one(), 0.92, 1.08)

    gap_x = x[:, None] - x[None]
    gap_y = y[:, None] - y[None]
    near = gap_x**2 + gap_y**2 < (1.02 * (radius[:, None] + radius[None])) ** 2
    both = present[:, None] & present[None] & (place != place.T)[..., None]
    crowded = (near & both).any(axis=(0, 1))

    clips = np.ones(len(uniforms))
    bodies = Bodies(
        x=x,
        y=y,
        velocity_x=velocity_x,
        velocity_y=velocity_y,
        angle=angle,
        spin=spin,
        radius=radius,
        mass=100 * radius**2,
        gravity=gravity,
        drag=np.where(top_view, 0.12, 0.0),
        # Constants, not draws: nothing in the first frames would tell them before the first bounce.
        restitution=np.where(top_view, 0.92, 0.72),
        friction=np.where(top_view, 0.1, 0.35),
        left=left * clips,
        right=right * clips,
        top=top * clips,
        bottom=bottom,
    )
    wall_pick, floor_pick, table_pick = one(), one(), one()
    wall = np.where(
        top_view[:, None],
        _TABLES[_pick(table_pick, len(_TABLES))],
        _WALLS[_pick(wall_pick, len(_WALLS))],
    )
    tint = (many(3).T - 0.5) * 36.0
    pan = np.where(one() < 0.3, (one() - 0.5) * 0.034, 0.0)
    return _Draft(
        aspect=aspect,
        kind=kind,
        num_objects=num_objects,
        shape=shape,
        colour=colour,
        present=present,
        crowded=crowded,
        bodies=bodies,
        marks=np.floor(2 * many()),
        floor=floor,
        light=-np.pi * _between(one(), 0.2, 0.8),  # from above
        brightness=_between(one(), 0.9, 1.06),
        pan=pan,
        wall_texture=_pick(one(), len(TEXTURES)),
        floor_texture=_pick(one(), len(TEXTURES)),
        wall_colours=np.stack([wall + tint, wall - tint], axis=1),
        floor_colour=_FLOORS[_pick(floor_pick, len(_FLOORS))],
        gradient=2 * np.pi * one(),
        periods=np.stack([_between(one(), 0.2, 0.36), _between(one(), 0.16, 0.3)]),
        amplitudes=np.stack([_between(one(), 4.0, 9.0), _between(one(), 4.0, 9.0)]),
        phase=one(),
        tilt=np.pi * one(),
        grid=2 * many(GRID[0] * GRID[1]).T.reshape(-1, *GRID) - 1,
    )


def _still_psnr(draft: _Draft, motion: Motion) -> Floats:
    """Estimate, in dB, how well the last input frame stands for the frames after it.

    With discs of colour c_i before a plain ground, d_i = c_i - ground, areas a_i, and o_ij the area
    that object i now shares with where object j was, the squared error is 2 sum_i a_i d_i^2 - 2
    sum_ij o_ij d_i d_j.
    """
    last = _INPUT_FRAMES - 1
    shade = 0.9  # what light leaves of a colour on average over an object
    ground = draft.wall_colours.mean(axis=1)  # (B, 3)
    contrast = (_PALETTE[draft.colour] * shade - ground) * draft.brightness[:, None]  # (N, B, 3)
    red, green, blue = np.moveaxis(contrast, 2, 0)
    product = red[:, None] * red + green[:, None] * green + blue[:, None] * blue  # (N, N, B)
    area = _AREAS[draft.shape] * draft.bodies.radius**2  # (N, B)
    size = np.sqrt(area / np.pi)  # of the disc of that area
    smaller = np.minimum(area[:, None], area)
    reach = np.maximum(size[:, None] + size, 1e-9)
    x, y = motion.x.transpose(1, 2, 0), motion.y.transpose(1, 2, 0)  # (T, N, B)
    now_x, now_y = x[_INPUT_FRAMES::2, :, None], y[_INPUT_FRAMES::2, :, None]
    apart = np.sqrt((now_x - x[last]) ** 2 + (now_y - y[last]) ** 2)  # (T, N, N, B)
    near = np.minimum(apart / reach, 1.0)
    # The lens of two equal discs is 1 - 1.27 near + 0.27 near^3 of one of them, within 1 %.
    shared = smaller * (1 - near * (1.27 - 0.27 * near * near))
    error = np.zeros(len(draft.kind))
    for i in range(MAX_OBJECTS):
        error += 2 * area[i] * product[i, i]
        for j in range(MAX_OBJECTS):
            error -= 2 * product[i, j] * shared[:, i, j].mean(axis=0)
    error = np.maximum(error / (3 * draft.aspect), 1.0)
    return 10 * np.log10(255.0**2 / error)


def _scene(draft: _Draft, row: int, seed: int) -> Scene:
    count = int(draft.num_objects[row])
    bodies = draft.bodies
    kind = KINDS[draft.kind[row]]
    shapes = tuple(SHAPES[i] for i in draft.shape[:count, row])
    names = list(COLOURS)
    colours = tuple(names[i] for i in draft.colour[:count, row])
    state = np.stack(
        [
            bodies.x[:count, row],
            bodies.y[:count, row],
            bodies.velocity_x[:count, row],
            bodies.velocity_y[:count, row],
            bodies.angle[:count, row],
            bodies.spin[:count, row],
        ]
    )
    background = Background(
        wall_texture=TEXTURES[draft.wall_texture[row]],
        floor_texture=TEXTURES[draft.floor_texture[row]],
        wall_colours=draft.wall_colours[row].copy(),
        floor_colour=draft.floor_colour[row].copy(),
        gradient=float(draft.gradient[row]),
        periods=(float(draft.periods[0, row]), float(draft.periods[1, row])),
        amplitudes=(float(draft.amplitudes[0, row]), float(draft.amplitudes[1, row])),
        phase=float(draft.phase[row]),
        tilt=float(draft.tilt[row]),
        grid=draft.grid[row].copy(),
    )
    return Scene(
        seed=seed,
        kind=kind,
        aspect=draft.aspect,
        shapes=shapes,
        colours=colours,
        radii=bodies.radius[:count, row].copy(),
        masses=bodies.mass[:count, row].copy(),
        state=state,
        marks=draft.marks[:count, row].copy(),
        gravity=float(bodies.gravity[row]),
        drag=float(bodies.drag[row]),
        restitution=float(bodies.restitution[row]),
        friction=float(bodies.friction[row]),
        left=float(bodies.left[row]),
        right=float(bodies.right[row]),
        top=float(bodies.top[row]),
        bottom=float(bodies.bottom[row]),
        floor=float(draft.floor[row]),
        light=float(draft.light[row]),
        brightness=float(draft.brightness[row]),
        pan=float(draft.pan[row]),
        background=background,
        caption=_caption(kind, shapes, colours, float(state[2, 0])),
    )


def _caption(
    kind: str, shapes: tuple[str, ...], colours: tuple[str, ...], velocity_x: float
) -> str:
    """Say what the first object is and does, then name the others."""

    def name(index: int) -> str:
        article = "an" if colours[index] == "orange" else "a"
        return f"{article} {colours[index]} {shapes[index]}"

    side = "right" if velocity_x > 0 else "left"
    action = {
        "drop": f"falls to the floor and bounces, drifting to the {side}",
        "throw": f"is thrown up to the {side} and falls in an arc",
        "roll": f"rolls to the {side} along the floor",
        "meet": f"flies to the {side} through the air",
        "billiards": f"slides to the {side} across a table seen from above",
    }[kind]
    others = [name(index) for index in range(1, len(shapes))]
    company = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
    sentence = f"{name(0)} {action}, with {company}."
    return sentence[0].upper() + sentence[1:]
