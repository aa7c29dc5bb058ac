"""Pictures of scenes in torch: signed distances with edges smooth over one pixel.

A background is painted once a clip. Objects and their shadows are painted in small windows around
them, a tenth of the picture, and written back; everything is vectorised over the clips of a chunk
and their frames. Axes: B clips, T frames, H/W picture, h/w window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiny.motion import FPS, Motion
from tiny.parts import Scene
from tiny.scenes import COLOURS, GRID, OUTLINES
from worldline.errors import InputError

CPU_MEMORY = 1_000_000_000  # bytes that a chunk may take
CUDA_MEMORY = 8_000_000_000
_REACH = 1.2  # collision radii from the centre to the farthest painted point of any shape
_LIGHT_MARK = (244.0, 240.0, 230.0)
_DARK_MARK = (58.0, 60.0, 72.0)


def render(
    scenes: Sequence[Scene],
    motion: Motion,
    height: int,
    width: int,
    device: str | torch.device = "cpu",
    *,
    max_memory: int | None = None,
) -> Tensor:
    """Return the clips as uint8 (B, T, H, W, 3) on `device`.

    Args:
        scenes: B scenes, drawn for about the aspect of the picture.
        motion: of these scenes, T frames.
        height: of the picture, in pixels; 16 or more.
        width: of the picture, in pixels.
        device: where the work is done. CPU and GPU may differ by one level.
        max_memory: bytes that a chunk of clips may take besides the result; no pixel depends on it.

    Raises:
        InputError: the picture is smaller than 16 pixels, or `motion` is of other scenes.
    """
    device = torch.device(device)
    frames = motion.x.shape[1]
    clips = torch.empty((len(scenes), frames, height, width, 3), dtype=torch.uint8, device=device)
    for part in _chunks(scenes, motion, height, width, device, max_memory):
        batch = _Batch.gather(scenes[part], motion, part, height, width, device)
        clips[part] = _paint(batch, scenes[part])
    return clips


def object_masks(
    scenes: Sequence[Scene],
    motion: Motion,
    height: int,
    width: int,
    device: str | torch.device = "cpu",
    *,
    objects: Sequence[int] | None = None,
    max_memory: int | None = None,
) -> Tensor:
    """Return bool (B, T, H, W): pixels at least half covered by an object.

    `objects` picks which, by their place in the scene; all of them by default. An object counts
    whole, even where another hides it.
    """
    device = torch.device(device)
    frames = motion.x.shape[1]
    masks = torch.zeros((len(scenes), frames, height, width), dtype=torch.bool, device=device)
    for part in _chunks(scenes, motion, height, width, device, max_memory):
        batch = _Batch.gather(scenes[part], motion, part, height, width, device)
        for index in range(batch.radius.shape[1]) if objects is None else objects:
            window = batch.window(index)
            covered = (window.coverage() >= 0.5).flatten()
            flat = masks[part].view(-1)
            places = window.places.flatten()
            flat[places] = flat[places] | covered
    return masks


def _chunks(
    scenes: Sequence[Scene],
    motion: Motion,
    height: int,
    width: int,
    device: torch.device,
    max_memory: int | None,
) -> Iterator[slice]:
    frames = motion.x.shape[1]
    if min(height, width) < 16:
        raise InputError(
            f"the picture is {height} x {width}; it must be at least 16 pixels each way"
        )
    if len(scenes) != len(motion.x):
        raise InputError(f"{len(scenes)} scenes, but the motion of {len(motion.x)}")
    if max_memory is None:
        max_memory = CUDA_MEMORY if device.type == "cuda" else CPU_MEMORY
    # Floats of a chunk: the picture, its clamped copy, a bool picture; windows of a fifth of it, 20
    # at a time.
    one_clip = frames * height * width * 4 * (2 * 3 + 5)
    step = max(1, max_memory // one_clip)
    for start in range(0, len(scenes), step):
        yield slice(start, min(start + step, len(scenes)))


@dataclass(frozen=True)
class _Batch:
    """The numbers of a chunk as float32 tensors, lengths in pixels."""

    frames: int
    height: int
    width: int
    x: Tensor  # (B, T, N)
    y: Tensor
    angle: Tensor
    radius: Tensor  # (B, N); 0 where a clip has fewer objects
    corners: Tensor  # (B, N)
    outer: Tensor  # in collision radii
    inner: Tensor
    rounding: Tensor
    ball: Tensor  # 1 for balls, 0 for others
    mark: Tensor  # 0 a stripe, 1 a dot
    colour: Tensor  # (B, N, 3)
    mark_colour: Tensor
    light: Tensor  # (B, 2), unit
    brightness: Tensor  # (B,)
    floor: Tensor  # (B,), pixels; below the picture where there is none
    bottom: Tensor  # (B,)
    shift: Tensor  # (B, T), pixels that the picture has moved to the left
    half_window: int

    @classmethod
    def gather(
        cls,
        scenes: Sequence[Scene],
        motion: Motion,
        part: slice,
        height: int,
        width: int,
        device: torch.device,
    ) -> _Batch:
        num_clips, frames, num_objects = motion.x[part].shape
        objects = np.zeros((num_clips, num_objects, 7))
        objects[..., 1] = 1  # corners: no division by 0 where no object is
        colours = np.zeros((2, num_clips, num_objects, 3))
        for row, scene in enumerate(scenes):
            for index, (shape, name) in enumerate(zip(scene.shapes, scene.colours, strict=True)):
                outline = OUTLINES[shape]
                objects[row, index] = (
                    scene.radii[index],
                    outline.corners,
                    outline.outer,
                    outline.inner,
                    outline.rounding,
                    shape == "ball",
                    scene.marks[index],
                )
                colours[0, row, index] = COLOURS[name]
                pale = name in ("white", "yellow", "cyan")
                colours[1, row, index] = _DARK_MARK if pale else _LIGHT_MARK
        clip = np.array(
            [
                (math.cos(s.light), math.sin(s.light), s.brightness, s.floor, s.bottom, s.pan)
                for s in scenes
            ]
        )
        seconds = np.arange(frames) / FPS
        shift = clip[:, 5:] * seconds  # (B, T), from 0: a longer clip begins with the same frames
        largest = max(float(scene.radii.max()) for scene in scenes)

        def tensor(array: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(array.astype(np.float32)).to(device)

        radius, corners, outer, inner, rounding, ball, mark = tensor(objects).unbind(-1)
        clips = tensor(clip)
        return cls(
            frames=frames,
            height=height,
            width=width,
            x=tensor((motion.x[part] - shift[..., None]) * height),
            y=tensor(motion.y[part] * height),
            angle=tensor(np.mod(motion.angle[part], 2 * np.pi)),
            radius=radius * height,
            corners=corners,
            outer=outer,
            inner=inner,
            rounding=rounding,
            ball=ball,
            mark=mark,
            colour=tensor(colours[0]),
            mark_colour=tensor(colours[1]),
            light=clips[:, :2],
            brightness=clips[:, 2],
            floor=clips[:, 3] * height,
            bottom=clips[:, 4] * height,
            shift=tensor(shift * height),
            # Its size changes no pixel: outside the object nothing is painted.
            half_window=math.ceil(largest * _REACH * height) + 2,
        )

    def window(self, index: int) -> _Window:
        return _Window(self, index)


def _places(
    batch: _Batch,
    x: Tensor,
    y: Tensor,
    half_height: int,
    half_width: int,
    clips: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows around points (B, T): columns (B, T, 1, w), rows (B, T, h, 1), flat places.

    A window that would leave the picture is moved inside; what it holds is measured from the point
    all the same. `clips` (B,) says which clips of the batch the points are of; all of them by
    default.
    """
    high, wide = min(2 * half_height, batch.height), min(2 * half_width, batch.width)
    left = (x - wide / 2).round().long().clamp(0, batch.width - wide)
    top = (y - high / 2).round().long().clamp(0, batch.height - high)
    device = x.device
    columns = (left[..., None] + torch.arange(wide, device=device))[..., None, :]
    rows = (top[..., None] + torch.arange(high, device=device))[..., None]
    if clips is None:
        clips = torch.arange(len(x), device=device)
    picture = clips[:, None] * batch.frames + torch.arange(batch.frames, device=device)
    return columns, rows, (picture[..., None, None] * batch.height + rows) * batch.width + columns


class _Window:
    """The pixels around one object of every clip, in every frame."""

    def __init__(self, batch: _Batch, index: int) -> None:
        self.batch, self.index = batch, index
        half = batch.half_window
        columns, rows, self.places = _places(
            batch, batch.x[..., index], batch.y[..., index], half, half
        )
        self.radius = _spread(batch.radius[:, index])  # (B, 1, 1, 1)
        scale = 1 / self.radius.clamp(min=1e-3)
        # From the centre of the object to the centre of the pixel, in collision radii.
        self.x = (columns + 0.5 - batch.x[..., index, None, None]) * scale
        self.y = (rows + 0.5 - batch.y[..., index, None, None]) * scale
        angle = batch.angle[..., index, None, None]
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
        batch, index = self.batch, self.index
        corners = _spread(batch.corners[:, index])
        outer, inner = _spread(batch.outer[:, index]), _spread(batch.inner[:, index])
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
        return torch.where(inside, -distance, distance) - _spread(batch.rounding[:, index])


def _spread(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _paint(batch: _Batch, scenes: Sequence[Scene]) -> Tensor:
    picture = _backgrounds(batch, scenes)  # (B, T, H, W, 3), contiguous
    flat = picture.view(-1, 3)
    num_objects = batch.radius.shape[1]
    # The shadows first: they lie on the ground, under every object.
    for flat_view, of_this_view in (
        (False, batch.floor < batch.height),
        (True, batch.floor >= batch.height),
    ):
        clips = of_this_view.nonzero()[:, 0]
        for index in range(num_objects if len(clips) else 0):
            _paint_shadow(batch, index, flat, clips, from_above=flat_view)
    for index in range(num_objects):
        _paint_object(batch, index, flat)
    picture *= batch.brightness.view(-1, 1, 1, 1, 1)
    return picture.round_().clamp_(0, 255).to(torch.uint8)


def _paint_shadow(
    batch: _Batch, index: int, flat: Tensor, clips: Tensor, *, from_above: bool
) -> None:
    """Darken the ground under an object; on a table, a little away from the light."""
    radius = batch.radius[clips, index, None]  # (B, 1)
    x, y = batch.x[clips, :, index], batch.y[clips, :, index]
    present = (radius > 0).float()
    radius = radius.clamp(min=1e-3)
    half = batch.half_window
    if from_above:
        light = batch.light[clips]
        x, y = x - 0.16 * radius * light[:, :1], y - 0.16 * radius * light[:, 1:]
        strength = 0.4 * present.expand_as(x)
        half_width = half_height = 1.2 * radius.expand_as(x)
        columns, rows, places = _places(batch, x, y, half, half, clips)
    else:
        bottom = batch.bottom[clips, None]
        high = ((bottom - y - radius) / batch.height).clamp(min=0)
        strength = 0.45 * present * (1 - high / 0.7).clamp(min=0)
        # Higher objects have wider, fainter shadows; none at all from 0.7 heights on, where the
        # window would end.
        half_width = (1.1 + 0.8 * high) * radius
        half_height = 0.28 * half_width
        y = bottom.expand_as(x)
        columns, rows, places = _places(
            batch, x, y, math.ceil(0.42 * half) + 1, math.ceil(1.4 * half), clips
        )
    across = (columns + 0.5 - x[..., None, None]) / half_width[..., None, None]
    down = (rows + 0.5 - y[..., None, None]) / half_height[..., None, None]
    dark = (1 - across.square() - down.square()).clamp(0, 1) * strength[..., None, None]
    places = places.flatten()
    flat[places] = flat[places] * (1 - dark).reshape(-1, 1)


def _paint_object(batch: _Batch, index: int, flat: Tensor) -> None:
    window = _Window(batch, index)
    light_x, light_y = _spread(batch.light[:, 0]), _spread(batch.light[:, 1])
    ball = _spread(batch.ball[:, index])
    # Balls darken from the middle outwards, the other shapes along a bevelled edge.
    rim_width = torch.where(ball > 0, 1.0, 0.16)
    rim = (1 + window.distance / rim_width).clamp(0, 1).square()
    facing = window.x * light_x + window.y * light_y
    shade = 0.97 + 0.17 * facing - (0.16 + 0.06 * ball) * rim
    gloss_x, gloss_y = window.x - 0.42 * light_x, window.y - 0.42 * light_y
    gloss = (1 - (gloss_x.square() + gloss_y.square()) / 0.09).clamp(0, 1).square() * ball

    mark = _spread(batch.mark[:, index])
    stripe = window.turned_y.abs() - 0.2
    dot = ((window.turned_x - 0.48).square() + window.turned_y.square()).sqrt() - 0.3
    mark_distance = torch.where(mark > 0.5, dot, stripe)
    marked = (0.5 - mark_distance * window.radius).clamp(0, 1) * (0.85 * ball)
    cover = window.coverage().flatten()
    colour = batch.colour[:, index].view(-1, 1, 1, 1, 3)
    paint = colour + (batch.mark_colour[:, index].view(-1, 1, 1, 1, 3) - colour) * marked[..., None]
    paint = paint * shade[..., None] + 70 * gloss[..., None]
    places = window.places.flatten()
    behind = flat[places]
    flat[places] = behind + (paint.view(-1, 3) - behind) * cover[:, None]


def _backgrounds(batch: _Batch, scenes: Sequence[Scene]) -> Tensor:
    """Return float32 (B, T, H, W, 3); a camera pans over a picture wider than the frame."""
    device = batch.x.device
    pans = [row for row, scene in enumerate(scenes) if scene.pan]
    margin = max(
        (math.ceil(abs(scenes[row].pan) * batch.frames / FPS * batch.height) for row in pans),
        default=0,
    )
    margin += 1 if pans else 0
    wide = batch.width + 2 * margin
    x = (torch.arange(wide, device=device) + 0.5 - margin) / batch.height
    y = ((torch.arange(batch.height, device=device) + 0.5) / batch.height)[:, None]
    still = _still_backgrounds(scenes, x, y, 1.0 / batch.height)  # (B, H, W + 2 margin, 3)
    moving = still[:, None, :, margin : margin + batch.width].repeat(1, batch.frames, 1, 1, 1)
    if pans:
        rows = torch.tensor(pans, device=device)
        start = batch.shift[rows] + margin  # (B, T)
        whole = start.floor()
        part = (start - whole)[..., None, None, None]
        columns = whole.long()[..., None] + torch.arange(batch.width, device=device)  # (B, T, W)
        sideways = still[rows].transpose(1, 2)
        clip = torch.arange(len(pans), device=device)[:, None, None]
        near, far = sideways[clip, columns], sideways[clip, columns + 1]  # (B, T, W, H, 3)
        moving[rows] = torch.lerp(near, far, part).transpose(2, 3)
    return moving


def _still_backgrounds(scenes: Sequence[Scene], x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """Paint (B, H, W, 3) at columns x (W,) and rows y (H, 1), in picture heights."""
    grounds = [scene.background for scene in scenes]

    def gather(values: Sequence[object]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(x.device)

    colours = gather([(*g.wall_colours, g.floor_colour) for g in grounds])[
        :, None, None
    ]  # (B, 1, 1, 3, 3)
    direction = gather([(math.cos(g.gradient), math.sin(g.gradient)) for g in grounds])[
        :, :, None, None
    ]
    aspect = gather([scene.aspect for scene in scenes]).view(-1, 1, 1)
    floor = gather([scene.floor for scene in scenes]).view(-1, 1, 1)
    across, down = 2 * x / aspect - 1, 2 * y - 1
    mix = (0.5 + 0.45 * (direction[:, 0] * across + direction[:, 1] * down)).clamp(0, 1)[..., None]
    first, last, below = colours.unbind(-2)
    wall = first + (last - first) * mix
    names = ([g.wall_texture for g in grounds], [g.floor_texture for g in grounds])
    wall += _textures(scenes, names[0], 0, x, y, pixel)[..., None]
    depth = ((y - floor) / (1 - floor).clamp(min=1e-3)).clamp(0, 1)
    near = (
        below * (0.86 + 0.2 * depth)[..., None]
        + _textures(scenes, names[1], 1, x, y, pixel)[..., None]
    )
    edge = ((y - floor) / pixel + 0.5).clamp(0, 1)[..., None]
    return torch.lerp(wall, near, edge)


def _textures(
    scenes: Sequence[Scene], names: Sequence[str], layer: int, x: Tensor, y: Tensor, pixel: float
) -> Tensor:
    """Return the patterns of the walls (layer 0) or the floors (1) in grey levels, (B, H, W)."""
    patterns = torch.zeros((len(scenes), y.shape[0], x.shape[0]), device=x.device)
    for name in sorted(set(names) - {"plain"}):
        rows = [row for row, other in enumerate(names) if other == name]
        grounds = [scenes[row].background for row in rows]
        numbers = np.array(
            [
                (g.periods[layer], g.amplitudes[layer], g.phase, math.cos(g.tilt), math.sin(g.tilt))
                for g in grounds
            ],
            dtype=np.float32,
        )
        period, amplitude, phase, cosine, sine = (
            torch.from_numpy(numbers).to(x.device)[:, :, None, None].unbind(1)
        )
        if name == "noise":
            grid = torch.from_numpy(np.stack([g.grid for g in grounds]).astype(np.float32))
            pattern = _value_noise(grid.to(x.device), x / float(scenes[0].aspect), y)
        else:
            slope = (cosine, sine)
            pattern = _pattern(
                name, x + phase * period, y + 0 * period, period, phase, slope, pixel
            )
        patterns[rows] = amplitude * pattern
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
    """Return a pattern in -1 to 1, (B, H, W), whose edges are one pixel wide."""

    def square(position: Tensor) -> Tensor:
        """Of a position, -1 and 1 in turn, half a period each."""
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
