"""Detection and pixelation of faces.

Source: RetinaFace, arXiv 1905.00641, with ResNet-50; the numbers are those of the released filter.
Axes: N images, P priors (boxes at fixed places, which the network corrects).
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.errors import NonFiniteError
from worldline.weights.keymap import KeyMap, renamed_by

WIDTH = 256
_STEPS = (8, 16, 32)  # pixels between priors of each level
_SIDES = ((16, 32), (64, 128), (256, 512))  # of the priors, in pixels
_VARIANCES = (0.1, 0.2)
_MEAN_BGR = (104.0, 117.0, 123.0)
_MIN_SIDE = 20  # pixels; smaller faces are not blurred
_BLOCKS = 5  # a face becomes 5 x 5 squares
_BATCH_PIXELS = 4 << 20


def _convolution(channels: int, width: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, size, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class _Pyramid(nn.Module):
    """Feature pyramid: three maps of `WIDTH` channels, finest first."""

    def __init__(self) -> None:
        super().__init__()
        self.output1 = _convolution(512, WIDTH, 1)
        self.output2 = _convolution(1024, WIDTH, 1)
        self.output3 = _convolution(2048, WIDTH, 1)
        self.merge1 = _convolution(WIDTH, WIDTH, 3)
        self.merge2 = _convolution(WIDTH, WIDTH, 3)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        laterals = (self.output1, self.output2, self.output3)
        fine, middle, coarse = (F.relu(f(x)) for f, x in zip(laterals, maps, strict=True))
        middle = F.relu(self.merge2(middle + F.interpolate(coarse, middle.shape[-2:])))
        fine = F.relu(self.merge1(fine + F.interpolate(middle, fine.shape[-2:])))
        return [fine, middle, coarse]


class _Context(nn.Module):
    """Windows of 3, 5 and 7 pixels, the wider ones as chains of 3."""

    def __init__(self) -> None:
        super().__init__()
        half, quarter = WIDTH // 2, WIDTH // 4
        self.conv3X3 = _convolution(WIDTH, half, 3)
        self.conv5X5_1 = _convolution(WIDTH, quarter, 3)
        self.conv5X5_2 = _convolution(quarter, quarter, 3)
        self.conv7X7_2 = _convolution(quarter, quarter, 3)
        self.conv7x7_3 = _convolution(quarter, quarter, 3)

    def forward(self, x: Tensor) -> Tensor:
        middle = F.relu(self.conv5X5_1(x))
        wide = self.conv7x7_3(F.relu(self.conv7X7_2(middle)))
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(middle), wide], 1))


class _Head(nn.Module):
    """`count` numbers for each of the two priors at a place."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv1x1 = nn.Conv2d(WIDTH, 2 * count, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.count))


class RetinaFace(nn.Module):
    """Images of `prepare` -> corrections of the priors, and probability of a face at each.

    Landmarks are loaded, since loading is strict, and not computed.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetBackbone, ResNetConfig

        stages = {"out_features": ["stage2", "stage3", "stage4"]}
        self.body = ResNetBackbone(ResNetConfig.from_dict(stages))
        self.fpn = _Pyramid()
        self.ssh1, self.ssh2, self.ssh3 = _Context(), _Context(), _Context()
        self.ClassHead = nn.ModuleList(_Head(2) for _ in _STEPS)
        self.BboxHead = nn.ModuleList(_Head(4) for _ in _STEPS)
        self.LandmarkHead = nn.ModuleList(_Head(10) for _ in _STEPS)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Inputs of the heads, one map for each level, finest first."""
        levels = self.fpn(self.body(images).feature_maps)
        contexts = (self.ssh1, self.ssh2, self.ssh3)
        return [context(x) for context, x in zip(contexts, levels, strict=True)]

    @staticmethod
    def join(heads: nn.ModuleList, maps: list[Tensor]) -> Tensor:
        return torch.cat([head(x) for head, x in zip(heads, maps, strict=True)], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections (N, P, 4) and probabilities of "no face" and "face" (N, P, 2)."""
        maps = self.maps(images)
        return self.join(self.BboxHead, maps), self.join(self.ClassHead, maps).softmax(-1)


_RELEASED = {  # of transformers' ResNet -> of torchvision's, whose numbers begin at 1
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"encoder\.stages(\d)\.layers": r"layer\1",
    r"layer(\d)\.convolution": r"conv\1",
    r"layer(\d)\.normalization": r"bn\1",
    r"shortcut\.convolution": "downsample.0",
    r"shortcut\.normalization": "downsample.1",
}


def key_map(network: nn.Module) -> KeyMap:
    """Names of `Resnet50_Final.pth`, which may lack the first "module."."""
    names = {}
    for name in network.state_dict():
        counted = re.sub(r"(stages|layer)\.(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", name)
        names[renamed_by(_RELEASED, counted)] = name
    return KeyMap(names, prefixes=("module.", ""))


def prepare(frames: Tensor) -> Tensor:
    """Frames uint8 (N, H, W, 3), RGB, as the network's input: float32 (N, 3, H, W), BGR."""
    bgr = frames.flip(-1).to(torch.float32)
    return (bgr - bgr.new_tensor(_MEAN_BGR)).permute(0, 3, 1, 2).contiguous()


def priors(height: int, width: int) -> Tensor:
    """Centre and size (P, 4) of every prior, in shares of width and height, float32."""
    return torch.tensor(
        [
            ((x + step / 2) / width, (y + step / 2) / height, side / width, side / height)
            for step, sides in zip(_STEPS, _SIDES, strict=True)
            for y, x, side in itertools.product(
                range(0, height, step), range(0, width, step), sides
            )
        ]
    )


def decode(corrections: Tensor, priors: Tensor) -> Tensor:
    """Corners (..., P, 4), x1 y1 x2 y2, in shares of width and height."""
    centre = priors[:, :2] + corrections[..., :2] * _VARIANCES[0] * priors[:, 2:]
    size = priors[:, 2:] * (corrections[..., 2:] * _VARIANCES[1]).exp()
    low = centre - size / 2
    return torch.cat([low, low + size], -1)


def select(
    boxes: np.ndarray,
    scores: np.ndarray,
    *,
    min_score: float = 0.7,
    max_overlap: float = 0.4,
    candidates: int = 5000,
    keep: int = 750,
) -> np.ndarray:
    """Non-maximum suppression of boxes (P, 4), corners in pixels: those to blur, surest first.

    `max_overlap` is an intersection over union.
    """
    confident = scores > min_score
    boxes, scores = boxes[confident], scores[confident]
    order = scores.argsort()[::-1][:candidates]
    boxes, scores = boxes[order], scores[order]
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)  # pixels are counted, both ends
    selection: list[int] = []
    rest = scores.argsort()[::-1]
    while rest.size:
        first, rest = rest[0], rest[1:]
        selection.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[rest, :2])
        high = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        common = np.maximum(0.0, high - low + 1).prod(1)
        rest = rest[common / (areas[first] + areas[rest] - common) <= max_overlap]
    return boxes[selection[:keep]]


def pixelate(region: np.ndarray) -> np.ndarray:
    """Region uint8 (H, W, 3) as 5 x 5 squares of one colour each."""
    height, width = region.shape[:2]
    x = torch.from_numpy(np.ascontiguousarray(region)).permute(2, 0, 1)[None].to(torch.float32)
    small = F.interpolate(x, (_BLOCKS, _BLOCKS), mode="bilinear", align_corners=False)
    squares = small[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
    # the quotient is rounded before the product, as OpenCV does: where a block begins depends on it
    rows, columns = ((np.arange(n) * (1 / (n / _BLOCKS))).astype(np.int64) for n in (height, width))
    return squares[rows][:, columns]


def blur(frame: np.ndarray, boxes: np.ndarray) -> int:
    """Pixelate `boxes` (N, 4), corners in pixels, in place; the number of blurred faces."""
    count = 0
    for x1, y1, x2, y2 in boxes.astype(np.int64).tolist():  # towards zero
        if x2 - x1 < _MIN_SIDE or y2 - y1 < _MIN_SIDE:
            continue
        region = frame[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
        if region.size:  # else outside the frame
            region[:] = pixelate(region)
            count += 1
    return count


class FaceBlur:
    """The video filter that hides faces."""

    name = "face_blur_filter"

    def __init__(self, network: RetinaFace) -> None:
        self.network = network
        self.networks = (network,)

    @torch.inference_mode()
    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        """Copy of frames uint8 (T, H, W, 3) with faces pixelated, and their number."""
        height, width = frames.shape[1:3]
        device = next(self.network.parameters()).device
        fixed = priors(height, width).to(device)
        scale = fixed.new_tensor([width, height, width, height])
        blurred, count = frames.copy(), 0
        for batch in torch.from_numpy(blurred).split(max(1, _BATCH_PIXELS // (height * width))):
            corrections, scores = self.network(prepare(batch.to(device)))
            corners = decode(corrections, fixed) * scale
            if not (corners.isfinite().all() and scores.isfinite().all()):
                raise NonFiniteError(f"guardrail {self.name}: the boxes are not finite")
            faces = zip(corners.cpu().numpy(), scores[..., 1].cpu().numpy(), strict=True)
            for frame, (boxes, confidences) in zip(batch.numpy(), faces, strict=True):
                count += blur(frame, select(boxes, confidences))
        return blurred, count
