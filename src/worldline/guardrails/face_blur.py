"""Finds faces and pixelates them.

Source: RetinaFace, arXiv 1905.00641, with ResNet-50; the numbers are those of the released filter.
Axes: N images, C channels, P priors, that is boxes at fixed places that the network corrects.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.errors import Error
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import fill

WIDTH = 256
_STEPS = (8, 16, 32)  # pixels between priors of each level
_SIDES = ((16, 32), (64, 128), (256, 512))  # of the priors, in pixels
_VARIANCES = (0.1, 0.2)
_MEAN_BGR = (104.0, 117.0, 123.0)
_SMALLEST = 20  # pixels; faces below are left
_BLOCKS = 5  # a face becomes 5 x 5 squares
_PIXELS_AT_ONCE = 4 << 20


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _stage(channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(count - 1)))


class _Body(nn.Module):
    """ResNet-50 without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 3, 1)
        self.layer2 = _stage(256, 128, 4, 2)
        self.layer3 = _stage(512, 256, 6, 2)
        self.layer4 = _stage(1024, 512, 3, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer1(x)
        maps = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def _convolution(channels: int, width: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width)
    )


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output1 = _convolution(512, WIDTH, 1)
        self.output2 = _convolution(1024, WIDTH, 1)
        self.output3 = _convolution(2048, WIDTH, 1)
        self.merge1 = _convolution(WIDTH, WIDTH, 3)
        self.merge2 = _convolution(WIDTH, WIDTH, 3)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = (self.output1, self.output2, self.output3)
        fine, middle, coarse = (F.relu(f(x)) for f, x in zip(laterals, maps, strict=True))
        middle = F.relu(self.merge2(middle + F.interpolate(coarse, middle.shape[-2:])))
        fine = F.relu(self.merge1(fine + F.interpolate(middle, fine.shape[-2:])))
        return [fine, middle, coarse]


class _Context(nn.Module):
    """Looks at 3, 5 and 7 pixels around, the wider ones as chains of 3."""

    def __init__(self) -> None:
        super().__init__()
        half, quarter = WIDTH // 2, WIDTH // 4
        self.conv3x3 = _convolution(WIDTH, half, 3)
        self.conv5x5_1 = _convolution(WIDTH, quarter, 3)
        self.conv5x5_2 = _convolution(quarter, quarter, 3)
        self.conv7x7_2 = _convolution(quarter, quarter, 3)
        self.conv7x7_3 = _convolution(quarter, quarter, 3)

    def forward(self, x: Tensor) -> Tensor:
        middle = F.relu(self.conv5x5_1(x))
        wide = self.conv7x7_3(F.relu(self.conv7x7_2(middle)))
        return F.relu(torch.cat([self.conv3x3(x), self.conv5x5_2(middle), wide], 1))


class _Head(nn.Module):
    """`count` numbers for each of the two priors at a place."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv1x1 = nn.Conv2d(WIDTH, 2 * count, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.count))


class RetinaFace(nn.Module):
    """Images -> corrections of the priors, and how sure the network is of a face at each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()
        self.pyramid = _Pyramid()
        self.context = nn.ModuleList(_Context() for _ in _STEPS)
        self.scores = nn.ModuleList(_Head(2) for _ in _STEPS)
        self.boxes = nn.ModuleList(_Head(4) for _ in _STEPS)
        self.landmarks = nn.ModuleList(_Head(10) for _ in _STEPS)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what the heads see, a map for each level, finest first."""
        levels = self.pyramid(self.body(images))
        return [context(x) for context, x in zip(self.context, levels, strict=True)]

    @staticmethod
    def join(heads: nn.ModuleList, maps: list[Tensor]) -> Tensor:
        return torch.cat([head(x) for head, x in zip(heads, maps, strict=True)], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrections (N, P, 4) and shares of "no face" and "face" (N, P, 2).

        Args:
            images: of `prepare`. Landmarks are not computed: blurring needs none.
        """
        maps = self.maps(images)
        return self.join(self.boxes, maps), self.join(self.scores, maps).softmax(-1)


_CONV, _NORM = ("weight",), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _pairs(released: str, ours: str, leaves: tuple[str, ...]) -> dict[str, str]:
    return {f"{released}.{leaf}": f"{ours}.{leaf}" for leaf in leaves}


def _rename() -> dict[str, str]:
    block = "body.layer{i}.{j}"
    found = {**_pairs("body.conv1", "body.conv1", _CONV), **_pairs("body.bn1", "body.bn1", _NORM)}
    for number in (1, 2, 3):
        found |= _pairs(f"{block}.conv{number}", f"{block}.conv{number}", _CONV)
        found |= _pairs(f"{block}.bn{number}", f"{block}.bn{number}", _NORM)
    convolutions = {f"{block}.downsample": f"{block}.downsample"}
    for name in ("output1", "output2", "output3", "merge1", "merge2"):
        convolutions[f"fpn.{name}"] = f"pyramid.{name}"
    for level, name in itertools.product(
        range(3), ("conv3X3", "conv5X5_1", "conv5X5_2", "conv7X7_2", "conv7x7_3")
    ):
        convolutions[f"ssh{level + 1}.{name}"] = f"context.{level}.{name.lower()}"
    for released, ours in convolutions.items():
        found |= _pairs(f"{released}.0", f"{ours}.0", _CONV)
        found |= _pairs(f"{released}.1", f"{ours}.1", _NORM)
    for released, ours in (("Class", "scores"), ("Bbox", "boxes"), ("Landmark", "landmarks")):
        head, to = released + "Head.{i}.conv1x1", ours + ".{i}.conv1x1"
        found |= _pairs(head, to, ("weight", "bias"))
    return found


KEYS = KeyMap(rename=_rename(), prefixes=("module.", ""))


def load_retinaface(path: Path, device: torch.device | str = "cpu") -> RetinaFace:
    """Read `Resnet50_Final.pth`.

    Raises:
        CheckpointError: it is absent, damaged or of another network.
    """
    with torch.device("meta"):
        network = RetinaFace()
    fill(network, path, KEYS, device)
    return network


def prepare(frames: Tensor) -> Tensor:
    """Return frames uint8 (N, H, W, 3), RGB, as the network takes them: float32 (N, 3, H, W)."""
    bgr = frames.flip(-1).to(torch.float32)
    return (bgr - bgr.new_tensor(_MEAN_BGR)).permute(0, 3, 1, 2).contiguous()


def priors(height: int, width: int) -> Tensor:
    """Return centre and size (P, 4) of every prior, in shares of width and height, float32."""
    found = []
    for step, sides in zip(_STEPS, _SIDES, strict=True):
        rows, columns = math.ceil(height / step), math.ceil(width / step)
        for row, column, side in itertools.product(range(rows), range(columns), sides):
            x, y = (column + 0.5) * step / width, (row + 0.5) * step / height
            found.append((x, y, side / width, side / height))
    return torch.tensor(found, dtype=torch.float32)


def decode(corrections: Tensor, priors: Tensor) -> Tensor:
    """Return corners (..., P, 4), x1 y1 x2 y2 in shares of width and height."""
    centre = priors[:, :2] + corrections[..., :2] * _VARIANCES[0] * priors[:, 2:]
    size = priors[:, 2:] * (corrections[..., 2:] * _VARIANCES[1]).exp()
    low = centre - size / 2
    return torch.cat([low, low + size], -1)


def select(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    least: float = 0.7,
    overlap: float = 0.4,
    most: int = 5000,
    keep: int = 750,
) -> np.ndarray:
    """Return the boxes to blur, surest first.

    Args:
        boxes: (P, 4) corners in pixels.
        scores: (P,).
        least: a score must be above.
        overlap: of two boxes that share more of their union the less sure one goes.
        most: boxes that are compared.
        keep: boxes that are returned.
    """
    sure = scores > least
    boxes, scores = boxes[sure], scores[sure]
    order = scores.argsort()[::-1][:most]
    boxes, scores = boxes[order], scores[order]
    sides = boxes[:, 2:] - boxes[:, :2] + 1  # pixels are counted, both ends
    areas = sides[:, 0] * sides[:, 1]
    kept: list[int] = []
    left = scores.argsort()[::-1]
    while left.size:
        first, left = left[0], left[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[left, :2])
        high = np.minimum(boxes[first, 2:], boxes[left, 2:])
        common = np.maximum(0.0, high - low + 1).prod(1)
        left = left[common / (areas[first] + areas[left] - common) <= overlap]
    return boxes[kept[:keep]]


def pixelate(region: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) as 5 x 5 squares of one colour each."""
    height, width = region.shape[:2]
    x = torch.from_numpy(np.ascontiguousarray(region)).permute(2, 0, 1)[None].to(torch.float32)
    small = F.interpolate(x, (_BLOCKS, _BLOCKS), mode="bilinear", align_corners=False)
    squares = small[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
    # the quotient is rounded before the product, as OpenCV does: where a block begins depends on it
    rows, columns = ((np.arange(n) * (1 / (n / _BLOCKS))).astype(np.int64) for n in (height, width))
    return squares[rows][:, columns]


def blur(frame: np.ndarray, boxes: np.ndarray) -> int:
    """Pixelate `boxes`, corners in pixels, in place; return how many were large enough."""
    height, width = frame.shape[:2]
    count = 0
    for x1, y1, x2, y2 in boxes.astype(np.int64).tolist():  # towards zero
        if x2 - x1 < _SMALLEST or y2 - y1 < _SMALLEST:
            continue
        rows = slice(max(y1, 0), min(y2, height))
        columns = slice(max(x1, 0), min(x2, width))
        if rows.start >= rows.stop or columns.start >= columns.stop:  # outside the frame
            continue
        frame[rows, columns] = pixelate(frame[rows, columns])
        count += 1
    return count


class FaceBlur:
    """The video filter that hides faces."""

    name = "face_blur_filter"

    def __init__(self, network: RetinaFace) -> None:
        self.network = network
        self.networks = (network,)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> FaceBlur:
        """Load from `Resnet50_Final.pth`; raises as `load_retinaface`."""
        return cls(load_retinaface(path, device))

    @torch.inference_mode()
    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        """Return frames uint8 (T, H, W, 3) with faces pixelated, and how many; `frames` stays.

        Raises:
            Error: the network's numbers are not finite.
        """
        height, width = frames.shape[1:3]
        device = next(self.network.parameters()).device
        fixed = priors(height, width).to(device)
        scale = fixed.new_tensor([width, height, width, height])
        blurred, count = frames.copy(), 0
        step = max(1, _PIXELS_AT_ONCE // (height * width))
        for start in range(0, len(frames), step):
            part = torch.from_numpy(blurred[start : start + step]).to(device)
            corrections, shares = self.network(prepare(part))
            corners = decode(corrections, fixed) * scale
            if not (corners.isfinite().all() and shares.isfinite().all()):
                raise Error(f"guardrail {self.name} gave boxes that are no numbers")
            scores = shares[..., 1].cpu().numpy()
            boxes = corners.cpu().numpy()
            for frame, found, sure in zip(blurred[start:], boxes, scores, strict=False):
                count += blur(frame, select(found, sure))
        return blurred, count
