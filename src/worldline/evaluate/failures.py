"""Detectors of the two failures that the released table of the autoregressive models counts.

*Collapse*: the picture, or most of it, turns into one flat colour. *Appearance*: a large object is
there from one moment to the next, though it was nowhere before and did not come in over the border.
A still video, small artifacts, blocks, fast motion, a panning camera and a change of light are not
failures. How often the detectors err is measured by `benchmarks/failure_detectors.py`; a failure
rate means little without those figures, and `FailureRate` has both.

Both work on a copy of about 48 x 72 pixels, so that the size of a video does not matter.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.evaluate.metrics import Frames, as_clip

# The constants were chosen on the design seeds that benchmarks/failure_detectors.py names.
REDUCED_PIXELS = 48 * 72

# Collapse, each rule: (distance from the commonest colour within which a pixel has that colour, in
# grey levels of the reduced copy; share of the picture that has it; its rise since the input
# frames; part of its former contrast that this place keeps). The first is for a perfectly flat part
# of the picture, the second for the nearly flat whole.
COLLAPSES = ((5.0, 0.55, 0.12, 0.1), (12.0, 0.8, 0.35, 0.3))

# A blank frame: this share of it is within this distance of the commonest colour. The second is for
# the decoding of empty latents, which have a faint texture.
BLANKS = ((0.98, 5.0), (1.0, 12.0))

# Appearance. A patch is PATCH pixels square, one stands every STRIDE pixels.
PATCH = 4
STRIDE = 2
GAP = 7  # a new patch was nowhere this many frames ago: a fade of 6 frames is then complete
FURTHER_GAPS = (11, 16, 23)  # nor then: what was hidden for a moment is not new
FREE_DISTANCE = 0.12  # of the width; so far a thing may move within GAP frames
DISTANCE_PRICE = 60.0  # grey levels for each further width
NEW_LEVELS = 4.0  # root-mean-square difference from all that was there, in grey levels,
NEW_TEXTURE = 0.6  # and this part of the patch's own contrast, since texture never fits exactly
CLEARLY_NEW = 1.6  # times both; what is less new than this counts in part
# A thing that touches the border has most likely come in there, by up to 5 % of the width a frame.
# So only what was not there BORDER_GAP frames ago counts, and is BORDER patches inside.
BORDER_GAP = 3
BORDER = 5
LARGE_AREA = 0.047  # share of the picture; an object of 6 % loses its edges
WHOLE_AREA = 0.6  # above it everything is new: a cut, not an object


_SIDES = ((3, 1), (1, 0)), ((1, 3), (0, 1))  # windows with the neighbours of a cell, and padding


@dataclass(frozen=True)
class Failure:
    """One failure of one clip."""

    kind: str  # "collapse" or "appearance"
    frame: int  # where it is worst, counted from 0
    score: float  # share of the picture, in [0, 1]
    detail: str  # a few words for a person


@dataclass(frozen=True)
class Rate:
    """A share of clips: `count` of `total`, which is at least 1."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (Wilson, JASA 22, 1927), of use also at 0 of n."""
        z = 1.959964
        middle = (self.count + z**2 / 2) / (self.total + z**2)
        spread = self.value * (1 - self.value) / self.total + z**2 / (4 * self.total**2)
        half = z * math.sqrt(spread) / (1 + z**2 / self.total)
        return round(middle - half, 12), round(middle + half, 12)  # at 0 of n exactly 0, not 1e-17

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{self.count} of {self.total}"
        return f"{self.value:.1%} ({counts}; 95 % interval {low:.1%} to {high:.1%})"

    def as_json(self) -> dict[str, object]:
        interval = [round(end, 4) for end in self.interval]
        return {**asdict(self), "rate": round(self.value, 4), "interval_95": interval}


# benchmarks/results/failure_detectors.json, evaluation seeds; a test compares the two.
DETECTORS = {"false alarms": Rate(3, 661), "detection": Rate(348, 350)}


@dataclass(frozen=True)
class FailureRate:
    """Failure rate of a set of clips, beside the error rates of the detectors."""

    failed: Rate  # clips with at least one failure
    kinds: dict[str, int]  # clips by kind of failure; a clip with both counts in both

    def as_json(self) -> dict[str, object]:
        detectors = {name: rate.as_json() for name, rate in DETECTORS.items()}
        return {"failure_rate": self.failed.as_json(), "kinds": self.kinds, "detectors": detectors}


def failure_rate(failures: Sequence[Sequence[Failure]]) -> FailureRate:
    """Failure rate of the failures of each clip, at least one clip."""
    kinds = Counter(kind for clip in failures for kind in {failure.kind for failure in clip})
    return FailureRate(Rate(sum(map(bool, failures)), len(failures)), dict(kinds))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small pictures are done before other threads have woken.

    On busy cores, threads that wait for each other took 5 times as long and more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def find_failures(frames: Frames, num_input_frames: int = 9) -> list[Failure]:
    """Failures of a clip, uint8 (T, H, W, 3) of any size: at most one collapse and one appearance.

    The input frames at the start are not judged.
    """
    return find_in_reduced(reduce(frames), num_input_frames)


def find_in_reduced(copy: Tensor, num_input_frames: int) -> list[Failure]:
    """Failures of a clip from its reduced copy (T, 3, h, w), float32.

    Without input frames the first frame counts as sound, but a video that is blank behind it, and
    one of that frame alone that is blank, have collapsed; not one whose input frames are blank.
    """
    first, end = max(1, num_input_frames), len(copy)
    judged, given = copy[min(first, end - 1) :], copy[:num_input_frames]
    failures = []
    if collapses := list(_collapses(copy, first)):
        share, rise, frame = max(collapses, key=lambda collapse: collapse[0])
        detail = f"{share:.0%} of the picture has one colour, {rise:.0%} more than at the start"
        failures.append(Failure("collapse", frame, round(share, 4), detail))
        # A collapse begins up to 12 frames before it is found; after that no appearance counts,
        # since the first patch of the colour would be one.
        end = max(first, min(frame for _, _, frame in collapses) - 12)
    elif all(map(_is_blank, judged)) and not (len(given) and all(map(_is_blank, given))):
        frame = end - len(judged)
        failures.append(Failure("collapse", frame, 1.0, "all frames have one colour"))
    regions = (
        (area, row, column, frame)
        for frame in range(first, end)
        for area, row, column in _new_regions(copy, frame)
        if LARGE_AREA <= area <= WHOLE_AREA
    )
    if largest := max(regions, key=lambda region: region[0], default=None):
        area, row, column, frame = largest
        detail = (
            f"{area:.0%} of the picture, around {column:.0%} from the left and {row:.0%} from the "
            f"top, was nowhere {min(GAP, frame)} frames before"
        )
        failures.append(Failure("appearance", frame, round(area, 4), detail))
    return failures


def reduce(frames: Frames) -> Tensor:
    """Blurred copy, float32 (T, 3, h, w) of about REDUCED_PIXELS, of uint8 (T, H, W, 3)."""
    clip = as_clip(frames).cpu()
    height, width = clip.shape[1:3]
    scale = (REDUCED_PIXELS / (height * width)) ** 0.5
    size = max(2 * PATCH, round(height * scale)), max(2 * PATCH, round(width * scale))
    skip = max(1, int(1 / scale) // 5)  # five samples each way are enough for a mean
    thinned = clip[:, ::skip, ::skip].permute(0, 3, 1, 2)
    # Frame by frame: in float32 a whole clip of 4k frames would fill the memory.
    copy = torch.stack([F.adaptive_avg_pool2d(frame.float(), size) for frame in thinned])
    # 1 2 1 in both directions: half a pixel of motion changes little
    padded = F.pad(copy, (1,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, 1), 2, 1)


def _same_color(picture: Tensor, tolerance: float) -> Tensor:
    """Where (3, h, w) is within `tolerance` of its commonest colour: bool (h, w)."""
    pixels = picture.flatten(1).T  # (N, 3)
    bins = (pixels / tolerance).long()
    codes = (bins[:, 0] * 64 + bins[:, 1]) * 64 + bins[:, 2]
    center = pixels[codes == codes.bincount().argmax()].mean(0)
    for _ in range(3):  # a colour on the edge of two bins is centred here
        near = (pixels - center).abs().amax(1) < tolerance
        center = pixels[near].mean(0)
    return near.view(picture.shape[1:])


def _flat_share(picture: Tensor, tolerance: float) -> float:
    return float(_same_color(picture, tolerance).float().mean())


def _is_blank(picture: Tensor) -> bool:
    return any(_flat_share(picture, tolerance) >= share for share, tolerance in BLANKS)


def _contrast(picture: Tensor, where: Tensor) -> float:
    """Standard deviation of (3, h, w) over the pixels of `where`, root mean square of channels."""
    return float(picture[:, where].var(1, correction=0).mean().sqrt())


def _collapses(copy: Tensor, num_input_frames: int) -> Iterator[tuple[float, float, int]]:
    """Share of the commonest colour, its rise, and the frame, of each collapsed frame."""
    inputs = copy[:num_input_frames]
    for tolerance, least_share, least_rise, most_kept in COLLAPSES:
        before = max(_flat_share(picture, tolerance) for picture in inputs)
        for frame in range(num_input_frames, len(copy)):
            where = _same_color(copy[frame], tolerance)
            share = float(where.float().mean())
            if share < least_share or share - before < least_rise:
                continue
            # In the dark all has one colour, but a darkened picture keeps a part of its contrast.
            former = min(_contrast(picture, where) for picture in (inputs[0], inputs[-1]))
            if _contrast(copy[frame], where) < most_kept * former:
                yield share, share - before, frame


def _new_regions(copy: Tensor, frame: int) -> Iterator[tuple[float, float, float]]:
    """Area, row and column, all in [0, 1], of each connected region that is new in `frame`.

    A region that touches the border counts in part, by the rule of BORDER.
    """
    ratio = _novelty(copy, frame, GAP)
    # opened by a 3 x 3 square: strips uncovered by a moving thing are thinner
    eroded = -F.max_pool2d(-(ratio[None] > 1).float(), 3, 1, 1)  # what lies outside does not count
    new = F.max_pool2d(eroded, 3, 1, 1)[0] > 0
    weights = ((ratio - 1) / (CLEARLY_NEW - 1)).clamp(0, 1)
    entered, inner = torch.zeros_like(new), slice(BORDER, -BORDER)
    if new[1:-1, 1:-1].sum() < new.sum():
        entered[inner, inner] = _novelty(copy, frame, BORDER_GAP)[inner, inner] > 1
    for region in _components(new):
        row, column = (region.nonzero().float().mean(0) / torch.tensor(new.shape)).tolist()
        if region[1:-1, 1:-1].sum() < region.sum() <= WHOLE_AREA * new.numel():
            region = region & entered
        yield float(weights[region].sum() / new.numel()), row, column


def _novelty(copy: Tensor, frame: int, gap: int) -> Tensor:
    """Difference of each patch from all patches `gap` frames before: (rows, columns), above 1 new.

    Earlier frames are first brought to the frame's light.
    """
    patches = _patches(copy[frame, None])  # (1, N, 3 * PATCH^2)
    earlier = sorted({max(0, frame - back) for back in (gap, *FURTHER_GAPS)})
    others = _patches(_in_the_light_of(copy[earlier], copy[frame]))
    price, rows = _price(*copy.shape[2:])
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, so that matrix products compare all with all
    costs = price + others.square().sum(2)[:, None]
    nearest = costs.baddbmm_(patches.expand(len(others), -1, -1), others.mT, alpha=-2).amin((0, 2))
    squares = (nearest + patches[0].square().sum(1)) / patches.shape[2]
    texture = patches[0].unflatten(1, (3, -1)).var(2, correction=0).mean(1).sqrt()
    # rounding can leave -1e-3 where patches are equal
    novelty = squares.clamp_min(0).sqrt() / (NEW_LEVELS + NEW_TEXTURE * texture)
    return novelty.view(rows, -1)


@lru_cache(maxsize=8)
def _price(height: int, width: int) -> tuple[Tensor, int]:
    """Penalty (N, N), a sum of squares, for matching patches that are far apart; rows of them."""
    rows, columns = ((side - PATCH) // STRIDE + 1 for side in (height, width))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) * STRIDE / width
    beyond = (torch.cdist(places, places) - FREE_DISTANCE).clamp_min(0)
    return (DISTANCE_PRICE * beyond).square() * (3 * PATCH**2), rows


def _patches(pictures: Tensor) -> Tensor:
    """Cut (B, 3, h, w) into patches (B, N, 3 * PATCH^2)."""
    return F.unfold(pictures, PATCH, stride=STRIDE).transpose(1, 2)


def _in_the_light_of(pictures: Tensor, target: Tensor) -> Tensor:
    """Scale and shift channels of (B, 3, h, w) to fit (3, h, w) where most of a picture agrees.

    Least squares with Cauchy weights: a new object is an outlier and hardly moves the fit.
    """
    x, y = pictures.flatten(2), target.flatten(1)
    weights = torch.ones_like(x)
    for _ in range(6):
        share = weights / weights.sum(2, keepdim=True)
        mean_x, mean_y = ((share * value).sum(2, keepdim=True) for value in (x, y))
        from_x = share * (x - mean_x)
        # 50 square grey levels hold the gain near 1 where the picture is too flat to determine it.
        variance = (from_x * (x - mean_x)).sum(2, keepdim=True) + 50
        covariance = (from_x * (y - mean_y)).sum(2, keepdim=True) + 50
        gain = (covariance / variance).clamp(0.25, 4)
        offset = mean_y - gain * mean_x
        weights = 1 / (1 + ((y - gain * x - offset) / 8).square())
    return (gain * x + offset).view_as(pictures)


def _components(cells: Tensor) -> Iterator[Tensor]:
    """Mask of each region of (rows, columns) that is connected by its sides."""
    labels, before = torch.arange(1.0, cells.numel() + 1).view_as(cells) * cells, cells
    while not torch.equal(labels, before):
        before = labels
        beside = (F.max_pool2d(labels[None], size, 1, padding)[0] for size, padding in _SIDES)
        labels = torch.maximum(*beside) * cells
    for label in labels[cells].unique():
        yield labels == label
