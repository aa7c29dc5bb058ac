"""Break or degrade a true clip on purpose, to learn what the failure detectors catch and what not.

All functions take and return uint8 frames (T, H, W, 3), leave the input untouched, and draw
everything from one seed, so that a rate measured on given seeds can be measured again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

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

    Raises:
        ValueError: there is no frame after the input frames.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    room = _room(count, num_input_frames)
    length = int(draw.randint(1, min(12, room) + 1))
    start = int(draw.randint(num_input_frames, count - length + 1))
    name, color = (
        ("black", np.zeros(3)),
        ("white", np.full(3, 250.0)),
        ("grey", np.full(3, draw.uniform(60, 200))),
        ("mean", frames[start].reshape(-1, 3).mean(0)),
        ("colour", draw.uniform(0, 255, 3)),
    )[draw.randint(5)]
    mask = np.ones((height, width))
    if draw.rand() < 0.5:
        share = draw.uniform(0.65, 0.95)
        mask = _side(draw, height, width, share)
    residue, noise = draw.uniform(0, 0.04), draw.uniform(0, 4)
    result = frames.copy()
    for frame in range(start, count):
        weight = min(1.0, (frame - start + 1) / length) * (1 - residue) * mask[..., None]
        old = frames[frame].astype(np.float64)
        grain = draw.standard_normal((height, width, 3)) * noise * mask[..., None]
        result[frame] = np.clip(old * (1 - weight) + color * weight + grain, 0, 255)
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

    Raises:
        ValueError: there is no frame after the input frames.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    room = _room(count, num_input_frames)
    length = int(draw.randint(1, min(6, room) + 1))
    start = int(draw.randint(num_input_frames, count - length + 1))
    speed = draw.choice([0.0, 1.0]) * draw.uniform(0.003, 0.02) * width
    heading = draw.uniform(0, 2 * np.pi)
    while True:
        area = draw.uniform(0.06, 0.30)
        shape = ("ellipse", "rectangle")[draw.randint(2)]
        aspect, angle = draw.uniform(0.6, 1.6), draw.uniform(0, np.pi)
        fill = np.pi if shape == "ellipse" else 4.0
        across = np.sqrt(area * height * width / fill * aspect)  # half the object's sides
        down = across / aspect
        reach_x = np.hypot(across * np.cos(angle), down * np.sin(angle))
        reach_y = np.hypot(across * np.sin(angle), down * np.cos(angle))
        if shape == "rectangle":
            reach_x = abs(across * np.cos(angle)) + abs(down * np.sin(angle))
            reach_y = abs(across * np.sin(angle)) + abs(down * np.cos(angle))
        margin = 0.03 * height
        if reach_x + margin > width / 2 or reach_y + margin > height / 2:
            continue
        x = draw.uniform(reach_x + margin, width - reach_x - margin)
        y = draw.uniform(reach_y + margin, height - reach_y - margin)
        name, texture = _texture(draw, height, width, donor)
        inside = _cover(shape, height, width, x, y, across, down, angle) > 0.5
        error = texture[inside] - frames[start][inside]
        if np.sqrt((error**2).mean()) >= VISIBLE:
            break
    result = frames.copy()
    for frame in range(start, count):
        step_x = round((frame - start) * speed * np.cos(heading))
        step_y = round((frame - start) * speed * np.sin(heading))
        cover = _cover(shape, height, width, x + step_x, y + step_y, across, down, angle)
        weight = min(1.0, (frame - start + 1) / length) * cover[..., None]
        moved = np.roll(texture, (step_y, step_x), (0, 1))
        result[frame] = np.clip(frames[frame] * (1 - weight) + moved * weight, 0, 255)
    moving = "moving" if speed else "still"
    return Injected(result, "appearance", start, length, float(area), f"{moving} {name} {shape}")


def blur(frames: Frames, seed: int = 0) -> Frames:
    """Average over 3 to 5 pixels each way, more for large pictures."""
    size = 2 * (1 + seed % 2 + min(frames.shape[1:3]) // 300) + 1
    result = frames.astype(np.float32)
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (size // 2, size // 2)
        padded = np.pad(result, padding, mode="edge")
        sums = np.add.accumulate(padded, axis, dtype=np.float64)
        sums = np.insert(sums, 0, 0, axis)
        ends = [slice(None)] * 4
        starts = [slice(None)] * 4
        ends[axis], starts[axis] = slice(size, None), slice(None, -size)
        result = ((sums[tuple(ends)] - sums[tuple(starts)]) / size).astype(np.float32)
    return result.round().astype(np.uint8)


def quantise(frames: Frames, seed: int = 0) -> Frames:
    """Keep a third of the detail in each 4 x 4 block, its mean in coarse steps, new every 8 frames.

    So does a tokenizer's decoder at worst: blocks, and a jump where a latent frame begins.
    """
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    rows, columns = height // 4 * 4, width // 4 * 4
    result = frames.copy()
    for first in [0, *range(1, count, 8)]:
        last = 1 if first == 0 else min(first + 8, count)
        step = draw.uniform(8, 16)
        part = frames[first:last, :rows, :columns].astype(np.float32)
        blocks = part.reshape(last - first, rows // 4, 4, columns // 4, 4, 3)
        mean = blocks.mean((2, 4), keepdims=True)
        blocks = np.round(mean / step) * step + (blocks - mean) / 3
        result[first:last, :rows, :columns] = np.clip(blocks.reshape(part.shape), 0, 255)
    return result


def block_noise(frames: Frames, seed: int = 0) -> Frames:
    """Shift the colour of each 16 x 16 block by about 6 grey levels, anew every 8 frames."""
    draw = np.random.RandomState(seed)
    count, height, width, _ = frames.shape
    result = frames.copy()
    for first in [0, *range(1, count, 8)]:
        last = 1 if first == 0 else min(first + 8, count)
        noise = draw.standard_normal((-(-height // 16), -(-width // 16), 3)) * 6
        noise = noise.repeat(16, 0).repeat(16, 1)[:height, :width]
        result[first:last] = np.clip(frames[first:last] + noise, 0, 255)
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
    "blur": blur,
    "quantise": quantise,
    "block_noise": block_noise,
    "h264": h264,
    "relight": relight,
}


def _room(count: int, num_input_frames: int) -> int:
    if count <= num_input_frames:
        raise ValueError(
            f"a clip of {count} frames has none after its {num_input_frames} input frames; "
            f"use at least {num_input_frames + 1} frames"
        )
    return count - num_input_frames


def _side(
    draw: np.random.RandomState, height: int, width: int, share: float
) -> NDArray[np.float64]:
    """A soft-edged half plane at any angle that covers `share` of the picture: (H, W) in [0, 1]."""
    angle = draw.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:height, :width]
    along = rows * np.sin(angle) + columns * np.cos(angle)
    edge = np.quantile(along, share)
    return np.clip((edge - along) / (0.03 * height) + 0.5, 0, 1)


def _cover(
    shape: str,
    height: int,
    width: int,
    x: float,
    y: float,
    across: float,
    down: float,
    angle: float,
) -> NDArray[np.float64]:
    """How much of each pixel the object covers: (H, W) in [0, 1], with an edge one pixel wide."""
    rows, columns = np.mgrid[:height, :width]
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    if shape == "ellipse":
        inside = (1 - np.hypot(u / across, v / down)) * min(across, down)
    else:
        inside = np.minimum(across - abs(u), down - abs(v))
    return np.clip(inside + 0.5, 0, 1)


def _texture(
    draw: np.random.RandomState, height: int, width: int, donor: Frames | None
) -> tuple[str, NDArray[np.float64]]:
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
