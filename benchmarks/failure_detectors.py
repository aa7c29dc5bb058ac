"""How often do the failure detectors err? Writes results/failure_detectors.json.

    python -m benchmarks.failure_detectors [--assets ../shared/assets] [--clips 200] [--design]

False alarms are counted on true clips, as they are and degraded as codecs, tokenizers and cameras
do; detection on clips broken on purpose (`tiny.injected`). The physics clips and all
injections are of evaluation seeds that the thresholds were never chosen on; `--design` runs seeds
from 0, where thresholds may be chosen, and writes nothing. The few real clips served for both,
though not with these injections. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tiny.clips import make_clips
from tiny.injected import DEGRADATIONS, Frames, inject_appearance, inject_collapse
from worldline.evaluate.failures import Rate, find_failures
from worldline.video.read import read_video

HERE = Path(__file__).parent
FRAMES = 33
WINDOW_STRIDE = 9
REDUCED = (192, 320)  # rows and columns of the reduced real clips

DESIGN_SEED = 0
EVALUATION_SEED = 2_000_000
DESIGN = (
    "thresholds were chosen on physics clips 0 to 47, appearances 0 to 47 and 100 to 147, "
    "collapses 0 to 47, and windows of the same real clips"
)


def physics_clip(seed: int) -> Frames:
    return make_clips([seed], frames=FRAMES).frames[0].numpy()


def real_clips(assets: Path) -> dict[str, Frames]:
    """Each clip below `assets` that has 33 frames or more, reduced, by its path."""
    found = {}
    for path in sorted(assets.rglob("*.mp4")):
        frames = read_video(path).frames
        if len(frames) >= FRAMES:
            name = path.relative_to(assets).as_posix()
            found[name] = np.stack([_reduced(frame) for frame in frames])
    return found


def full_size_windows(assets: Path) -> Iterator[tuple[str, Frames]]:
    """The first 33 frames of each real clip, in full size."""
    for path in sorted(assets.rglob("*.mp4")):
        frames = read_video(path).frames[:FRAMES]
        if len(frames) == FRAMES:
            yield path.name, frames


def _reduced(frame: Frames) -> Frames:
    return np.asarray(Image.fromarray(frame).resize(REDUCED[::-1], Image.Resampling.BOX))


class Tally:
    """Counts by set, and the errors by name."""

    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = defaultdict(list)
        self.errors: dict[str, list[str]] = defaultdict(list)
        self.seconds: list[float] = []

    def look(self, group: str, name: str, clip: Frames, kind: str | None, inputs: int = 9) -> None:
        """Count whether a clip is called failed; `kind` is what was injected, None if true."""
        start = time.perf_counter()
        found = find_failures(clip, inputs)
        self.seconds.append(time.perf_counter() - start)
        # A clip fails whatever the failure is called, so a wrong kind is still a detection.
        self.hits[group].append(bool(found))
        if bool(found) != (kind is not None):
            words = ", ".join(f"{f.kind} at {f.frame} ({f.score:.3f})" for f in found)
            self.errors[group].append(f"{name}: {words or 'missed'}")

    def rate(self, *groups: str) -> Rate:
        hits = [hit for group in groups for hit in self.hits[group]]
        return Rate(sum(hits), len(hits))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=HERE.parent / "../shared/assets")
    parser.add_argument("--clips", type=int, default=200, help="true physics clips")
    parser.add_argument("--design", action="store_true", help="run seeds from 0; write nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results/failure_detectors.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = DESIGN_SEED if arguments.design else EVALUATION_SEED
    count, half = arguments.clips, max(1, arguments.clips // 2)
    tally = Tally()
    names = list(DEGRADATIONS)
    real = real_clips(arguments.assets) if arguments.assets.is_dir() else {}
    donors = list(real.values()) or [physics_clip(base + 900_000 + k) for k in range(8)]

    for k in range(count):
        seed = base + k
        clip = physics_clip(seed)
        tally.look("true physics", str(seed), clip, None)
        name = names[k % len(names)]
        degraded = DEGRADATIONS[name](clip, seed)
        tally.look("true physics, degraded", f"{seed} {name}", degraded, None)
        if k < half:
            tally.look("true physics, 1 input frame", str(seed), clip, None, inputs=1)

    for k in range(half):
        seed = base + 10_000 + k
        clip = physics_clip(seed)
        broken = inject_appearance(clip, seed, donor=donors[k % len(donors)])
        tally.look("appearance on physics", f"{seed} {broken.detail}", broken.frames, broken.kind)
        if k % 2:
            broken = inject_appearance(clip, seed + 1_000, 1, donors[k % len(donors)])
            group = "appearance on physics, 1 input frame"
            tally.look(group, f"{seed + 1_000} {broken.detail}", broken.frames, broken.kind, 1)
        else:
            broken = inject_collapse(clip, seed)
            name = f"{seed} {broken.detail} {broken.area:.2f}"
            tally.look("collapse on physics", name, broken.frames, broken.kind)

    windows = [
        (f"{name} from {start}", clip[start : start + FRAMES])
        for name, clip in real.items()
        for start in range(0, len(clip) - FRAMES + 1, WINDOW_STRIDE)
    ]
    for k, (name, clip) in enumerate(windows):
        tally.look("true real", name, clip, None)
        for degradation in (names[k % len(names)], names[(k + 2) % len(names)]):
            degraded = DEGRADATIONS[degradation](clip, base + k)
            tally.look("true real, degraded", f"{name} {degradation}", degraded, None)
    if real:
        for name, clip in full_size_windows(arguments.assets):
            tally.look("true real, full size", name, clip, None)
        for k in range(half):
            seed = base + 20_000 + k
            name, clip = windows[(k * 7) % len(windows)]
            donor = donors[(k * 3) % len(donors)] if k % 2 else physics_clip(seed)
            broken = inject_appearance(clip, seed, donor=donor)
            label = f"{seed} {name} {broken.detail}"
            tally.look("appearance on real", label, broken.frames, broken.kind)
            if k % 2:
                broken = inject_collapse(clip, seed)
                label = f"{seed} {name} {broken.detail} {broken.area:.2f}"
                tally.look("collapse on real", label, broken.frames, broken.kind)

    true = [group for group in tally.hits if group.startswith("true")]
    injected = [group for group in tally.hits if not group.startswith("true")]
    report = {
        "question": "how often do the failure detectors of worldline.evaluate.failures err",
        "false_alarms": tally.rate(*true).as_json(),
        "detection": tally.rate(*injected).as_json(),
        "sets": {group: tally.rate(group).as_json() for group in tally.hits},
        "errors": dict(tally.errors),
        "seeds": {
            "design": DESIGN,
            "evaluation": f"from {EVALUATION_SEED}, injections from 10,000 and 20,000 above",
            "used here": "design" if arguments.design else "evaluation",
        },
        "real_clips": sorted(real)
        if real
        else f"none: there is no folder {arguments.assets}; the sets on real clips were left out",
        "seconds_a_clip": {
            "median": round(float(np.median(tally.seconds)), 3),
            "largest": round(max(tally.seconds), 3),
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": platform.machine(),
            "threads": 1,
        },
    }
    text = json.dumps(report, indent=2)
    if not arguments.design:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
