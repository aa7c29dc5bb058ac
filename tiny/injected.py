"""Clips broken or degraded on purpose, to measure what the failure detectors catch.

All functions take and return uint8 frames (T, H, W, 3), leave the input untouched, and draw
everything from one seed, so that a rate measured on given seeds can be measured again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

# Under this root-mean-square difference from what it covers, a drawn object is camouflage rather
# than an object that anyone would see appear; it is drawn again.
VISIBLE = 30.0


@dataclass(frozen=True)
class Injected:
    """A clip broken on purpose, and how.

    Attributes:
        frames: (T, H, W, 3) uint8.
        kind: "collapse" or "appearance", the words of `failures.Failure`.
        start: first frame that differs from the true clip.
        length: frames from `start` until the failure is complete; 1 is a jump.
        area: share of the picture that is hit, in [0, 1].
        detail: what was drawn.
    """

    frames: Frames
    kind: str
    start: int
    length: int
    area: float
    detail: str


def inject_collapse(frames: Frames, seed: int, num_input_frames: int = 9) -> Injected:
    """Blend the whole picture, or 65 to 95 % of it, to one colour within 1 to 12 frames.

    Up to 4 % of the old picture stays visible, under noise of up to 4 grey levels, since a
    collapsed model seldom paints a perfectly even colour.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    start, length = _draw_span(draw, count, num_input_frames, most=12)
    name, color = (
        ("black", np.zeros(3)),
        ("white", np.full(3, 250.0)),
        ("grey", np.full(3, draw.uniform(60, 200))),
        ("mean", frames[start].reshape(-1, 3).mean(0)),
        ("colour", draw.uniform(0, 255, 3)),
    )[draw.randint(5)]
    mask = np.ones((height, width))
    if draw.rand() < 0.5:  # a soft-edged half plane at any angle
        share, angle = draw.uniform(0.65, 0.95), draw.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[:height, :width]
        along = rows * np.sin(angle) + columns * np.cos(angle)
        mask = np.clip((np.quantile(along, share) - along) / (0.03 * height) + 0.5, 0, 1)
    residue, noise = draw.uniform(0, 0.04), draw.uniform(0, 4)
    result = frames.copy()
    for frame in range(start, count):
        weight = min(1.0, (frame - start + 1) / length) * (1 - residue) * mask[..., None]
        grain = draw.standard_normal((height, width, 3)) * noise * mask[..., None]
        result[frame] = np.clip(frames[frame] * (1 - weight) + color * weight + grain, 0, 255)
    return Injected(result, "collapse", start, length, float(mask.mean()), name)


def inject_appearance(
    frames: Frames, seed: int, num_input_frames: int = 9, donor: Frames | None = None
) -> Injected:
    """Let an object of 6 to 30 % of the picture fade in within 1 to 6 frames, away from the border.

    It is an ellipse or a rectangle, turned, at rest or moving by up to 2 % of the width a frame;
    plain, striped, smoothly coloured, or cut from `donor`.

    Args:
        frames: (T, H, W, 3) uint8.
        seed: draws everything.
        num_input_frames: the object starts after these.
        donor: (T', H', W', 3) uint8, another clip whose middle frame lends texture.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    start, length = _draw_span(draw, count, num_input_frames, most=6)
    speed = draw.choice([0.0, 1.0]) * draw.uniform(0.003, 0.02) * width
    heading = draw.uniform(0, 2 * np.pi)
    while True:
        area = draw.uniform(0.06, 0.30)
        shape = ("ellipse", "rectangle")[draw.randint(2)]
        aspect, angle = draw.uniform(0.6, 1.6), draw.uniform(0, np.pi)
        fill = np.pi if shape == "ellipse" else 4.0
        across = np.sqrt(area * height * width / fill * aspect)  # half the object's sides
        half = np.array([across, across / aspect])
        sides = abs(
            half[:, None] * [[np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        reach = sides.sum(0) if shape == "rectangle" else np.hypot(*sides)  # along x and y
        low, size = reach + 0.03 * height, np.array([width, height])
        if (low > size / 2).any():
            continue
        centre = np.array([draw.uniform(a, b) for a, b in zip(low, size - low, strict=True)])
        name, texture = _draw_texture(draw, height, width, donor)
        inside = _coverage(shape, height, width, centre, half, angle) > 0.5
        error = texture[inside] - frames[start][inside]
        if np.sqrt((error**2).mean()) >= VISIBLE:
            break
    result = frames.copy()
    for frame in range(start, count):
        way = (frame - start) * speed
        step = np.array([round(way * np.cos(heading)), round(way * np.sin(heading))])
        cover = _coverage(shape, height, width, centre + step, half, angle)
        weight = min(1.0, (frame - start + 1) / length) * cover[..., None]
        moved = np.roll(texture, step[::-1], (0, 1))
        result[frame] = np.clip(frames[frame] * (1 - weight) + moved * weight, 0, 255)
    moving = "moving" if speed else "still"
    return Injected(result, "appearance", start, length, float(area), f"{moving} {name} {shape}")


def blur(frames: Frames, seed: int = 0) -> Frames:
    """Average over 3 to 5 pixels each way, more for large pictures."""
    half = 1 + seed % 2 + min(frames.shape[1:3]) // 300
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    padded = F.pad(pictures, (half,) * 4, mode="replicate")
    averaged = F.avg_pool2d(padded, 2 * half + 1, stride=1)
    return averaged.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def quantise(frames: Frames, seed: int = 0) -> Frames:
    """Keep a third of the detail in each 4 x 4 block, its mean in coarse steps, new every 8 frames.

    So does a tokenizer's decoder at worst: blocks, and a jump where a latent frame begins.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    rows, columns = height // 4 * 4, width // 4 * 4
    result = frames.copy()
    for latent in _latent_frames(count):
        step = draw.uniform(8, 16)
        part = frames[latent, :rows, :columns].astype(np.float32)
        blocks = part.reshape(-1, rows // 4, 4, columns // 4, 4, 3)
        mean = blocks.mean((2, 4), keepdims=True)
        blocks = np.round(mean / step) * step + (blocks - mean) / 3
        result[latent, :rows, :columns] = np.clip(blocks.reshape(part.shape), 0, 255)
    return result


def block_noise(frames: Frames, seed: int = 0) -> Frames:
    """Shift the colour of each 16 x 16 block by about 6 grey levels, anew every 8 frames."""
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    result = frames.copy()
    for latent in _latent_frames(count):
        noise = draw.standard_normal((-(-height // 16), -(-width // 16), 3)) * 6
        noise = noise.repeat(16, 0).repeat(16, 1)[:height, :width]
        result[latent] = np.clip(frames[latent] + noise, 0, 255)
    return result


def h264(frames: Frames, seed: int = 0) -> Frames:
    """Encode as poor H.264 (CRF 32 to 38) and decode again; an odd row or column is lost."""
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(32 + seed % 7), "preset": "veryfast"}
        stream.thread_count = 1
        for frame in frames[:, :height, :width]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as source:
        decoded = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    return np.stack(decoded).astype(np.uint8, copy=False)


def relight(frames: Frames, seed: int = 0) -> Frames:
    """Cut the light once: a gain of 0.6 to 1.4 and a tint of up to 8 % from a frame on."""
    draw = np.random.RandomState(seed)
    start = int(draw.randint(1, max(2, len(frames))))
    gain = draw.uniform(0.6, 1.4) * draw.uniform(0.92, 1.08, 3)
    result = frames.copy()
    result[start:] = np.clip(frames[start:] * gain, 0, 255)
    return result


# What codecs, tokenizers and cameras do to a sound clip; none of it is a failure.
DEGRADATIONS: dict[str, Callable[[Frames, int], Frames]] = {
    function.__name__: function for function in (blur, quantise, block_noise, h264, relight)
}


def _draw_span(
    draw: np.random.RandomState, count: int, num_input_frames: int, most: int
) -> tuple[int, int]:
    """First frame and length of a failure after the input frames."""
    length = int(draw.randint(1, min(most, count - num_input_frames) + 1))
    return int(draw.randint(num_input_frames, count - length + 1)), length


def _latent_frames(count: int) -> list[slice]:
    """Frames that one latent frame stands for: the first, then eight at a time."""
    return [slice(0, 1), *(slice(first, first + 8) for first in range(1, count, 8))]


def _coverage(
    shape: str, height: int, width: int, centre: Floats, half: Floats, angle: float
) -> Floats:
    """Share of each pixel that the object covers: (H, W) in [0, 1], with an edge one pixel wide."""
    rows, columns = np.mgrid[:height, :width]
    x, y = centre
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    across, down = half
    if shape == "ellipse":
        inside = (1 - np.hypot(u / across, v / down)) * min(across, down)
    else:
        inside = np.minimum(across - abs(u), down - abs(v))
    return np.clip(inside + 0.5, 0, 1)


def _draw_texture(
    draw: np.random.RandomState, height: int, width: int, donor: Frames | None
) -> tuple[str, Floats]:
    """A picture (H, W, 3) in [0, 255] to cut the object from, and its name."""
    kinds = ["plain", "striped", "smooth"] + (["donor"] if donor is not None else [])
    kind = kinds[draw.randint(len(kinds))]
    first, second = draw.uniform(0, 255, (2, 3))
    rows, columns = np.mgrid[:height, :width]
    if kind == "donor" and donor is not None:
        middle = donor[len(donor) // 2]
        up = np.linspace(0, middle.shape[0] - 1, height).round().astype(int)
        left = np.linspace(0, middle.shape[1] - 1, width).round().astype(int)
        return kind, middle[up][:, left].astype(np.float64)
    if kind == "plain":
        shade = np.linspace(0.9, 1.1, height)[:, None, None]
        return kind, np.clip(first * shade * np.ones((1, width, 1)), 0, 255)
    if kind == "striped":
        angle, period = draw.uniform(0, np.pi), draw.uniform(0.06, 0.2) * height
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period)
    else:
        wave = np.zeros((height, width))
        for _ in range(6):
            rate = draw.standard_normal(2) * 2 * np.pi / height * 2
            wave += np.sin(rows * rate[0] + columns * rate[1] + draw.uniform(0, 2 * np.pi)) / 2
    weight = np.clip(wave / 2 + 0.5, 0, 1)[..., None]
    return kind, first * weight + second * (1 - weight)
