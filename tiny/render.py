"""Pictures of scenes in torch: signed distances with edges smooth over one pixel.

A background is painted once a clip. Objects and their shadows are painted in small windows around
them, a tenth of the picture, and written back; everything is vectorised over the clips of a chunk
and their frames. Axes: B clips, T frames, N objects, H/W picture, h/w window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny.motion import FPS, Motion
from tiny.scenes import COLOURS, GRID, OUTLINES, SHAPES, TEXTURES, Scenes

MEMORY = {"cpu": 1_000_000_000, "cuda": 8_000_000_000}  # bytes that a chunk may take
_REACH = 1.2  # collision radii from the centre to the farthest painted point of any shape
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
_PALE = [name in ("white", "yellow", "cyan") for name in COLOURS]
_LIGHT_MARK = (244.0, 240.0, 230.0)
_DARK_MARK = (58.0, 60.0, 72.0)


def render(
    scenes: Scenes, motion: Motion, height: int, width: int, device: str | torch.device = "cpu"
) -> Tensor:
    """The clips as uint8 (B, T, H, W, 3) on `device`; CPU and GPU may differ by one level."""
    shape = (len(scenes), motion.x.shape[1], height, width, 3)
    clips = torch.empty(shape, dtype=torch.uint8, device=device)
    for rows, chunk in _chunks(scenes, motion, height, width, device):
        clips[rows] = _paint(chunk)
    return clips


def object_masks(
    scenes: Scenes,
    motion: Motion,
    height: int,
    width: int,
    device: str | torch.device = "cpu",
    *,
    objects: Sequence[int] | None = None,
) -> Tensor:
    """Pixels at least half covered by an object, bool (B, T, H, W).

    `objects` picks which, by their place in the scene; all of them by default. An object counts
    whole, even where another hides it.
    """
    shape = (len(scenes), motion.x.shape[1], height, width)
    masks = torch.zeros(shape, dtype=torch.bool, device=device)
    for rows, chunk in _chunks(scenes, motion, height, width, device):
        flat = masks[rows].view(-1)
        for index in range(chunk.num_objects) if objects is None else objects:
            window = _Window(chunk, index)
            places = window.places.flatten()
            flat[places] = flat[places] | (window.coverage() >= 0.5).flatten()
    return masks


def _chunks(
    scenes: Scenes, motion: Motion, height: int, width: int, device: str | torch.device
) -> Iterator[tuple[slice, _Chunk]]:
    device = torch.device(device)
    # float32 values of a clip: the picture, its clamped copy, a bool picture; windows of a fifth
    # of it, 20 at a time
    one_clip = motion.x.shape[1] * height * width * 4 * (2 * 3 + 5)
    step = max(1, MEMORY[device.type] // one_clip)
    for start in range(0, len(scenes), step):
        rows = slice(start, min(start + step, len(scenes)))
        part = Motion(*(values[rows] for values in motion))
        yield rows, _Chunk(scenes[rows], part, height, width, device)


class _Chunk:
    """Numbers of some scenes as float32 tensors, lengths in pixels."""

    def __init__(
        self, scenes: Scenes, motion: Motion, height: int, width: int, device: torch.device
    ) -> None:
        def tensor(array: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)

        self.scenes, self.height, self.width = scenes, height, width
        self.frames, self.num_objects = motion.x.shape[1:]
        # (B, T), from 0: a longer clip begins with the same frames
        shift = scenes.pan[:, None] * (np.arange(self.frames) / FPS)
        self.shift = tensor(shift * height)
        self.x = tensor((motion.x - shift[..., None]) * height)  # (B, T, N)
        self.y = tensor(motion.y * height)
        self.angle = tensor(np.mod(motion.angle, 2 * np.pi))
        radius = scenes.bodies.radius.T  # (B, N)
        self.radius = tensor(radius) * height
        outlines = np.array(
            [(o.corners, o.outer, o.inner, o.rounding) for o in map(OUTLINES.get, SHAPES) if o]
        )
        shape, colour = scenes.shape.T, scenes.colour.T
        self.corners, self.outer, self.inner, self.rounding = tensor(outlines[shape]).unbind(-1)
        self.ball = tensor(shape == SHAPES.index("ball"))
        self.mark = tensor(scenes.mark.T)
        self.colour = tensor(_PALETTE[colour])  # (B, N, 3)
        pale = np.array(_PALE)[colour][..., None]
        self.mark_colour = tensor(np.where(pale, _DARK_MARK, _LIGHT_MARK))
        light = [(math.cos(angle), math.sin(angle)) for angle in scenes.light]
        self.light = tensor(np.array(light))  # (B, 2), unit
        self.brightness = tensor(scenes.brightness)  # (B,)
        self.floor = tensor(scenes.floor) * height  # below the picture where there is none
        self.bottom = tensor(scenes.bodies.bottom) * height
        # its size changes no pixel: outside the object nothing is painted
        self.half_window = math.ceil(float(radius.max()) * _REACH * height) + 2


def _places(
    chunk: _Chunk, x: Tensor, y: Tensor, half_height: int, half_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows around points (B, T): columns (B, T, 1, w), rows (B, T, h, 1), flat places.

    A window that would leave the picture is moved inside; what it holds is measured from the point
    all the same.
    """
    high, wide = min(2 * half_height, chunk.height), min(2 * half_width, chunk.width)
    left = (x - wide / 2).round().long().clamp(0, chunk.width - wide)
    top = (y - high / 2).round().long().clamp(0, chunk.height - high)
    columns = (left[..., None] + torch.arange(wide, device=x.device))[..., None, :]
    rows = (top[..., None] + torch.arange(high, device=x.device))[..., None]
    picture = torch.arange(x.numel(), device=x.device).view(*x.shape, 1, 1)
    return columns, rows, (picture * chunk.height + rows) * chunk.width + columns


class _Window:
    """The pixels around one object of every clip, in every frame."""

    def __init__(self, chunk: _Chunk, index: int) -> None:
        self.chunk, self.index = chunk, index
        half = chunk.half_window
        columns, rows, self.places = _places(
            chunk, chunk.x[..., index], chunk.y[..., index], half, half
        )
        self.radius = _spread(chunk.radius[:, index])  # (B, 1, 1, 1)
        scale = 1 / self.radius.clamp(min=1e-3)
        # From the centre of the object to the centre of the pixel, in collision radii.
        self.x = (columns + 0.5 - chunk.x[..., index, None, None]) * scale
        self.y = (rows + 0.5 - chunk.y[..., index, None, None]) * scale
        angle = chunk.angle[..., index, None, None]
        cosine, sine = angle.cos(), angle.sin()
        self.turned_x = self.x * cosine + self.y * sine
        self.turned_y = self.y * cosine - self.x * sine
        self.distance = self._distance()

    def coverage(self) -> Tensor:
        """The share of each pixel that the object covers, 0 to 1, (B, T, h, w)."""
        return (0.5 - self.distance * self.radius).clamp(0, 1) * (self.radius > 0)

    def _distance(self) -> Tensor:
        """Signed distance to the outline, in collision radii, negative inside.

        The plane is folded into the wedge between a corner and the point half-way to the next;
        there the outline is one segment. A ball's segment is a point, and the rounding is the ball.
        """
        chunk, index = self.chunk, self.index
        corners = _spread(chunk.corners[:, index])
        outer, inner = _spread(chunk.outer[:, index]), _spread(chunk.inner[:, index])
        half_wedge = math.pi / corners
        length = (self.turned_x.square() + self.turned_y.square()).sqrt()
        turn = torch.atan2(self.turned_y, self.turned_x) / (2 * half_wedge)
        turn = (turn - turn.round()).abs() * (2 * half_wedge)
        x, y = length * turn.cos() - outer, length * turn.sin()
        edge_x, edge_y = inner * half_wedge.cos() - outer, inner * half_wedge.sin()
        along = (x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2).clamp(min=1e-9)
        along = along.clamp(0, 1)
        distance = ((x - along * edge_x).square() + (y - along * edge_y).square()).sqrt()
        inside = edge_x * y - edge_y * x > 0
        return torch.where(inside, -distance, distance) - _spread(chunk.rounding[:, index])


def _spread(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _paint(chunk: _Chunk) -> Tensor:
    picture = _backgrounds(chunk)  # (B, T, H, W, 3), contiguous
    flat = picture.view(-1, 3)
    for index in range(chunk.num_objects):  # first, since they lie on the ground, under all objects
        _paint_shadow(chunk, index, flat)
    for index in range(chunk.num_objects):
        _paint_object(chunk, index, flat)
    picture *= chunk.brightness.view(-1, 1, 1, 1, 1)
    return picture.round_().clamp_(0, 255).to(torch.uint8)


def _paint_shadow(chunk: _Chunk, index: int, flat: Tensor) -> None:
    """Darken the ground under an object: on the floor, or on a table a little away from the light.

    Higher objects have wider, fainter shadows; none at all from 0.7 heights on, where the window
    would end.
    """
    radius = chunk.radius[:, index, None]  # (B, 1)
    present, radius = (radius > 0).float(), radius.clamp(min=1e-3)
    x, y = chunk.x[..., index], chunk.y[..., index]
    table, bottom = (chunk.floor >= chunk.height)[:, None], chunk.bottom[:, None]
    high = ((bottom - y - radius) / chunk.height).clamp(min=0)
    strength = 0.45 * present * (1 - high / 0.7).clamp(min=0)
    strength = torch.where(table, 0.4 * present, strength)
    half_width = torch.where(table, 1.2 * radius, (1.1 + 0.8 * high) * radius)
    half_height = torch.where(table, half_width, 0.28 * half_width)
    x = torch.where(table, x - 0.16 * radius * chunk.light[:, :1], x)
    y = torch.where(table, y - 0.16 * radius * chunk.light[:, 1:], bottom)
    half = chunk.half_window
    columns, rows, places = _places(chunk, x, y, half, math.ceil(1.4 * half))
    across = (columns + 0.5 - x[..., None, None]) / half_width[..., None, None]
    down = (rows + 0.5 - y[..., None, None]) / half_height[..., None, None]
    dark = (1 - across.square() - down.square()).clamp(0, 1) * strength[..., None, None]
    places = places.flatten()
    flat[places] = flat[places] * (1 - dark).reshape(-1, 1)


def _paint_object(chunk: _Chunk, index: int, flat: Tensor) -> None:
    window = _Window(chunk, index)
    light_x, light_y = _spread(chunk.light[:, 0]), _spread(chunk.light[:, 1])
    ball = _spread(chunk.ball[:, index])
    # Balls darken from the middle outwards, the other shapes along a bevelled edge.
    rim_width = torch.where(ball > 0, 1.0, 0.16)
    rim = (1 + window.distance / rim_width).clamp(0, 1).square()
    facing = window.x * light_x + window.y * light_y
    shade = 0.97 + 0.17 * facing - (0.16 + 0.06 * ball) * rim
    gloss_x, gloss_y = window.x - 0.42 * light_x, window.y - 0.42 * light_y
    gloss = (1 - (gloss_x.square() + gloss_y.square()) / 0.09).clamp(0, 1).square() * ball

    mark = _spread(chunk.mark[:, index])
    stripe = window.turned_y.abs() - 0.2
    dot = ((window.turned_x - 0.48).square() + window.turned_y.square()).sqrt() - 0.3
    mark_distance = torch.where(mark > 0.5, dot, stripe)
    marked = (0.5 - mark_distance * window.radius).clamp(0, 1) * (0.85 * ball)
    cover = window.coverage().flatten()
    colour = chunk.colour[:, index].view(-1, 1, 1, 1, 3)
    paint = colour + (chunk.mark_colour[:, index].view(-1, 1, 1, 1, 3) - colour) * marked[..., None]
    paint = paint * shade[..., None] + 70 * gloss[..., None]
    places = window.places.flatten()
    behind = flat[places]
    flat[places] = behind + (paint.view(-1, 3) - behind) * cover[:, None]


def _backgrounds(chunk: _Chunk) -> Tensor:
    """Float32 (B, T, H, W, 3); a camera pans over a picture wider than the frame."""
    device, pan = chunk.x.device, chunk.scenes.pan
    pans = np.flatnonzero(pan)
    margin = math.ceil(np.abs(pan).max() * chunk.frames / FPS * chunk.height) + (len(pans) > 0)
    x = torch.arange(chunk.width + 2 * margin, device=device) + 0.5 - margin
    y = (torch.arange(chunk.height, device=device) + 0.5)[:, None]
    still = _still_backgrounds(chunk.scenes, x / chunk.height, y / chunk.height)
    moving = still[:, None, :, margin : margin + chunk.width].repeat(1, chunk.frames, 1, 1, 1)
    if len(pans):
        rows = torch.from_numpy(pans).to(device)
        start = chunk.shift[rows] + margin  # (B, T)
        whole = start.floor()
        columns = whole.long()[..., None] + torch.arange(chunk.width, device=device)  # (B, T, W)
        sideways = still[rows].transpose(1, 2)
        clip = torch.arange(len(pans), device=device)[:, None, None]
        near, far = sideways[clip, columns], sideways[clip, columns + 1]  # (B, T, W, H, 3)
        moving[rows] = torch.lerp(near, far, (start - whole)[..., None, None, None]).transpose(2, 3)
    return moving


def _still_backgrounds(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Walls and floors (B, H, W, 3) at columns x (W,) and rows y (H, 1), in picture heights."""

    def gather(values: Sequence[float] | NDArray[np.float64]) -> Tensor:
        """(B, 1, 1) of (B,)."""
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(x.device)[:, None, None]

    pixel = 1.0 / y.shape[0]
    across_slope = gather([math.cos(angle) for angle in scenes.gradient])
    down_slope = gather([math.sin(angle) for angle in scenes.gradient])
    floor = gather(scenes.floor)
    across, down = 2 * x / gather(scenes.aspect) - 1, 2 * y - 1
    mix = (0.5 + 0.45 * (across_slope * across + down_slope * down)).clamp(0, 1)[..., None]
    colours = (*scenes.wall_colours, scenes.floor_colour)
    first, last, below = (gather(colour.T) for colour in colours)  # (B, 1, 1, 3)
    wall = first + (last - first) * mix + _textures(scenes, 0, x, y, pixel)[..., None]
    depth = ((y - floor) / (1 - floor).clamp(min=1e-3)).clamp(0, 1)
    near = below * (0.86 + 0.2 * depth)[..., None] + _textures(scenes, 1, x, y, pixel)[..., None]
    edge = ((y - floor) / pixel + 0.5).clamp(0, 1)[..., None]
    return torch.lerp(wall, near, edge)


def _textures(scenes: Scenes, layer: int, x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Patterns of the walls (layer 0) or the floors (1) in grey levels, (B, H, W)."""
    patterns = torch.zeros((len(scenes), y.shape[0], x.shape[0]), device=x.device)
    textures = (scenes.wall_texture, scenes.floor_texture)[layer]
    for texture in np.unique(textures):
        name, rows = TEXTURES[texture], np.flatnonzero(textures == texture)
        if name == "plain":
            continue
        some = scenes[rows]
        slope = [(math.cos(tilt), math.sin(tilt)) for tilt in some.tilt]
        numbers = np.array(
            [some.periods[layer], some.amplitudes[layer], some.phase, *np.transpose(slope)],
            dtype=np.float32,
        )
        period, amplitude, phase, cosine, sine = (
            torch.from_numpy(numbers).to(x.device)[..., None, None].unbind()
        )
        if name == "noise":
            grid = torch.from_numpy(some.grid.astype(np.float32)).to(x.device)
            pattern = _value_noise(grid.permute(2, 0, 1), x / float(some.aspect[0]), y)
        else:
            pattern = _pattern(
                name, x + phase * period, y + 0 * period, period, phase, (cosine, sine), pixel
            )
        patterns[torch.from_numpy(rows)] = amplitude * pattern
    return patterns


def _pattern(
    name: str,
    x: Tensor,
    y: Tensor,
    period: Tensor,
    phase: Tensor,
    slope: tuple[Tensor, Tensor],
    pixel: float,
) -> Tensor:
    """A pattern in -1 to 1, (B, H, W), whose edges are one pixel wide."""

    def square(position: Tensor) -> Tensor:
        """-1 and 1 in turn, half a period each."""
        turns = position / period
        away = 0.25 - (turns - turns.round()).abs()  # 0 at an edge, in periods
        return (away * (2 * period / pixel)).clamp(-1, 1)

    def joint(position: Tensor, every: Tensor) -> Tensor:
        """1 on a thin line at each multiple of `every`, 0 elsewhere."""
        turns = position / every
        away = (turns - turns.round()).abs() * (every / pixel)  # pixels from the line
        half_line = 0.008 / pixel  # a pixel at 128 rows
        return (half_line + 0.5 - away).clamp(0, 1)

    if name == "checker":
        return square(x) * square(y)
    if name == "stripes":
        return square(x * slope[0] + y * slope[1])
    if name == "bricks":
        row = (y / (0.6 * period)).floor()
        upright = joint(x + row.remainder(2) * 0.6 * period, 1.2 * period)
        return 0.3 - 1.3 * torch.maximum(joint(y, 0.6 * period), upright)
    # Planks: each board has a shade of its own.
    board = (y / (0.8 * period)).floor()
    return (board * 2.4 + 6 * phase).sin() * 0.7 - 0.6 * joint(y, 0.8 * period)


def _value_noise(grid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Smooth steps between the corners of `grid` (B, *GRID), at x and y in 0 to 1: (B, H, W)."""
    column, row = x.clamp(0, 0.999) * (GRID[1] - 1), y.clamp(0, 0.999) * (GRID[0] - 1)
    left, top = column.long(), row.long()
    right_share, low_share = column - left, row - top
    right_share = right_share.square() * (3 - 2 * right_share)
    low_share = low_share.square() * (3 - 2 * low_share)
    upper = torch.lerp(grid[:, top, left], grid[:, top, left + 1], right_share)
    lower = torch.lerp(grid[:, top + 1, left], grid[:, top + 1, left + 1], right_share)
    return torch.lerp(upper, lower, low_share)
