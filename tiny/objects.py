"""Objects in a physics clip, by colour and shape, and whether they are those of its caption.

Everything is measured in the picture itself, with no learned part. A wall and a floor are fitted to
all frames; what differs from them by more than a shadow does is an object, and its hue, which
neither shade nor gloss changes, is its colour. The outline is described by its angular moments,
which do not change with rotation, and compared with those of `scenes.OUTLINES`. All frames together
decide: one frame may hide or smear an object.

Axes: F sampled frames, h/w picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from tiny.scenes import COLOURS, OUTLINES, SHAPES, Outline

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]

SAMPLED_FRAMES = 9
ROWS = 128  # larger pictures are reduced to about this height

# Chosen on seeds below 1,000,000.
LOWEST_WALL_ROW = 0.82  # in heights; where a scene has a floor, it begins below
DIFFERENCE = 30.0  # grey levels from wall or floor, at the brightness that fits best
SHADE = (0.5, 1.08)  # range of that brightness: shadows, and texture
WHITE_CHROMA = 0.2  # below this part of the brightest channel a bright colour is white
AREAS = (0.012, 0.057)  # least and most share of the picture; objects have 0.026 to 0.048
LEAST_FRAMES = 0.5  # share of the frames in which an object has to be seen
LEAST_FILLED = 0.6  # of the convex hull; a star has 0.8, a ball with a mark 0.75
REACH = 0.2  # heights from an object's middle to its farthest point, at most
LEAST_MOMENTS = 0.35  # of an outline's own moments; what has less is as round as a ball


class Found(NamedTuple):
    """One object: names of `scenes.COLOURS` and `scenes.SHAPES`, and how much of it there is."""

    colour: str
    shape: str
    frames: float  # share of the frames in which it was seen
    area: float  # median share of the picture that it covers


class Verdict(NamedTuple):
    """Whether a clip has what its caption names."""

    subject_found: bool  # the first object, with its colour and its shape
    companions_colours_found: bool  # an object in the colour of each other one
    objects: tuple[Found, ...]

    @property
    def passed(self) -> bool:
        """Both. The subject alone is in one of 14 clips by chance: 2.25 of 32 kinds of object."""
        return self.subject_found and self.companions_colours_found


def compare(objects: Sequence[Found], caption: str) -> Verdict:
    """Compare the objects of a clip with a caption of `scenes.draw_scenes`."""
    subject, *companions = named_objects(caption)
    return Verdict(
        subject in {(found.colour, found.shape) for found in objects},
        {name for name, _ in companions} <= {found.colour for found in objects},
        tuple(objects),
    )


def named_objects(caption: str) -> list[tuple[str, str]]:
    """Colour and shape of each object that a caption names, in its order; the subject is first."""
    pattern = rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
    return re.findall(pattern, caption.lower())


def find_objects(frames: NDArray[np.uint8] | Tensor) -> list[Found]:
    """Objects of a physics clip, uint8 (T, H, W, 3): one of each colour at most, largest first."""
    clip = _sample(frames)
    labels = _label(clip, _background(clip))
    found = []
    # White last: a mark on a coloured ball is white too.
    for colour in sorted(range(len(COLOURS)), key=_WHITE.__eq__):
        views = _views(labels == colour)
        if len(views) < LEAST_FRAMES * len(clip):
            continue
        for frame, (_, hull) in views.items():
            labels[frame][hull & (labels[frame] == _WHITE)] = colour
        shape = _shape(np.median([_moments(*view) for view in views.values()], axis=0))
        area = float(np.median([mask.mean() for mask, _ in views.values()]))
        found.append(Found(_NAMES[colour], shape, len(views) / len(clip), area))
    return sorted(found, key=lambda item: -item.area)


def _sample(frames: NDArray[np.uint8] | Tensor) -> Floats:
    """A few frames at about ROWS rows, (F, h, w, 3) in 0 to 255."""
    clip = frames if isinstance(frames, Tensor) else torch.from_numpy(np.ascontiguousarray(frames))
    places = torch.linspace(0, len(clip) - 1, min(SAMPLED_FRAMES, len(clip))).round().long()
    picked = clip[places].permute(0, 3, 1, 2)
    height, width = picked.shape[2:]
    size = (ROWS, round(width * ROWS / height))
    mode = "area" if height >= ROWS else "bilinear"
    copy = functional.interpolate(picked.cpu().float(), size=size, mode=mode)
    return copy.permute(0, 2, 3, 1).numpy()


def _background(clip: Floats) -> Floats:
    """Fit the wall's gradient and the floor below it, (h, w, 3)."""
    height, width = clip.shape[1:3]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    basis = np.stack([np.ones_like(x), x, y], axis=-1)
    lowest = round(LOWEST_WALL_ROW * height)
    upper = np.s_[:lowest:3, ::3]
    wall = basis @ _robust_fit(basis[upper], clip[:, *upper])
    lower = np.s_[round(0.95 * height) :, ::3]
    floor = basis @ _robust_fit(basis[lower], clip[:, *lower])
    # A low row belongs to the one that most of its pixels are nearer to.
    rows = clip[:, lowest:]
    errors = [np.median(abs(rows - ground[lowest:]), axis=(0, 2, 3)) for ground in (wall, floor)]
    wall[lowest:][errors[1] < errors[0]] = floor[lowest:][errors[1] < errors[0]]
    return wall


def _robust_fit(basis: Floats, frames: Floats) -> Floats:
    """Fit (F, h, w, 3) by `basis` (h, w, 3): coefficients (3, 3). Objects are outliers."""
    columns = np.tile(basis.reshape(-1, 3), (len(frames), 1))
    pixels = frames.reshape(-1, 3)
    fit = np.outer((1, 0, 0), np.median(pixels, axis=0))
    for _ in range(10):
        errors = np.linalg.norm(pixels - columns @ fit, axis=1)
        weighted = columns / (1 + (errors / 20) ** 2)[:, None] ** 2
        fit = np.linalg.solve(weighted.T @ columns + 1e-3 * np.eye(3), weighted.T @ pixels)
    return fit


def _label(clip: Floats, background: Floats) -> NDArray[np.int8]:
    """Colour of each pixel (F, h, w), -1 for none."""
    squares = np.einsum("hwc,hwc->hw", background, background).clip(min=1)
    light = (np.einsum("fhwc,hwc->fhw", clip, background) / squares).clip(*SHADE)
    errors = clip - light[..., None] * background
    labels = np.full(clip.shape[:3], -1, np.int8)
    different = np.einsum("fhwc,fhwc->fhw", errors, errors) > DIFFERENCE**2
    pixels = clip[different]  # (N, 3)
    hue, chroma = _hue(pixels)
    near = np.cos(hue[:, None] - _HUES)
    near[:, _WHITE] = -np.inf
    colour = np.where(chroma < WHITE_CHROMA, _WHITE, near.argmax(1))
    # Grey and no brighter than what is behind it: the dark mark on a pale ball.
    dark = (colour == _WHITE) & (light[different] < 1)
    labels[different] = np.where(dark, -1, colour)
    return labels


def _hue(pixels: Floats) -> tuple[Floats, Floats]:
    """Angle of (N, 3) on the colour circle, and its distance from grey, 0 to 1."""
    red, green, blue = pixels.T
    across, up = red - (green + blue) / 2, math.sqrt(0.75) * (green - blue)
    return np.arctan2(up, across), np.hypot(across, up) / np.maximum(pixels.max(-1), 1.0)


_NAMES = tuple(COLOURS)
_WHITE = _NAMES.index("white")
_HUES = _hue(np.array(list(COLOURS.values()), np.float32))[0]


def _views(mask: Mask) -> dict[int, tuple[Mask, Mask]]:
    """The largest object and its convex hull, by frame of (F, h, w) that has one."""
    height, width = mask.shape[1:]
    least, most = np.array(AREAS) * height * width
    if (mask.sum((1, 2)) >= least).mean() < LEAST_FRAMES:
        return {}
    # The majority of the 3 x 3 around a pixel decides: blurred fringes of another colour vanish.
    grid = torch.from_numpy(mask)[:, None].float()
    grid = (functional.avg_pool2d(grid, 3, 1, 1) > 0.5).float()
    coarse = functional.avg_pool2d(functional.avg_pool2d(grid, 4, ceil_mode=True), 7, 1, 3)
    views = {}
    for frame, place in enumerate(coarse.flatten(1).argmax(1).tolist()):
        points = np.argwhere(grid[frame, 0].numpy())
        middle = 4 * np.array(divmod(place, coarse.shape[3])) + 1.5
        for _ in range(3):  # the mean of what is within reach of the mean
            near = points[np.linalg.norm(points - middle, axis=1) < REACH * height]
            middle = near.mean(0) if len(near) else middle
        if least <= len(near) <= most:
            pixels = np.zeros_like(mask[frame])
            pixels[near[:, 0], near[:, 1]] = True
            hull = _hull(pixels)
            if len(near) >= LEAST_FILLED * hull.sum():
                views[frame] = pixels, hull
    return views


def _hull(mask: Mask) -> Mask:
    """Convex hull of the True pixels, as pixels."""
    rows, columns = np.nonzero(mask)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    normals = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    # The smallest polygon around them with 48 fixed directions of sides.
    limits = (normals @ np.stack([rows, columns])).max(axis=1)
    hull = np.zeros_like(mask)
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    hull[box] = True
    places = np.argwhere(hull)
    hull[box] = (places @ normals.T <= limits + 1e-6).all(axis=1).reshape(hull[box].shape)
    return hull


def _moments(mask: Mask, hull: Mask) -> Floats:
    """|sum z^n| / sum |z|^n for n = 3, 4, 5 of an object and of its hull: (2, 3).

    z is counted from the middle of the hull. They are 0 for a disc, and stand out for n of an
    outline with n corners. Place, size and rotation change nothing.
    """
    middle = np.argwhere(hull).mean(axis=0)
    parts = [(np.argwhere(pixels) - middle) @ (1j, 1) for pixels in (mask, hull)]
    powers = (3, 4, 5)
    return np.array([[abs((z**n).sum()) / (np.abs(z) ** n).sum() for n in powers] for z in parts])


def _shape(moments: Floats) -> str:
    """The outline whose moments these are, or a part of, since blur rounds corners.

    That has to hold for the pixels, of which a star lacks some, and for the hull, of which a mark
    on a ball takes none.
    """
    parts = {
        shape: float(((moments * known).sum(1) / (known * known).sum(1)).min())
        for shape, known in _known_moments().items()
    }
    shape = max(parts, key=parts.__getitem__)
    return shape if parts[shape] > LEAST_MOMENTS else "ball"


@cache
def _known_moments() -> dict[str, Floats]:
    """Moments of each outline with corners, drawn about as large as in a clip."""
    y, x = np.mgrid[-24:25, -24:25] / 18
    masks = {shape: _inside(outline, x + 1j * y) for shape, outline in OUTLINES.items()}
    return {shape: _moments(m, _hull(m)) for shape, m in masks.items() if shape != "ball"}


def _inside(outline: Outline, places: NDArray[np.complexfloating]) -> Mask:
    """Whether complex places are inside an outline around 0."""
    half = math.pi / outline.corners
    turn = np.angle(places)
    # Folded to between a corner and the point half-way to the next, the outline is one segment.
    turn = np.abs(turn - 2 * half * np.round(turn / (2 * half)))
    offset = np.abs(places) * np.exp(1j * turn) - outline.outer
    side = outline.inner * np.exp(1j * half) - outline.outer
    along = (offset * side.conjugate()).real / max(abs(side) ** 2, 1e-9)
    near = np.abs(offset - along.clip(0, 1) * side) <= outline.rounding
    return near | ((side.conjugate() * offset).imag > 0)
