"""Samples a second that a training loop gets of a folder of videos, by 0, 1 and 2 workers.

    python benchmarks/training_data.py ../shared/assets/diffusion --frames 93 --size 704 1280

They are decoded and resized; the first batch, until which workers begin, is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch

from worldline.train.data.clips import Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.loader import Loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 848))
    parser.add_argument("--fit", choices=("crop", "stretch"), default="crop")
    parser.add_argument("--resample", choices=("bicubic", "bilinear"), default="bicubic")
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    transform = Transform(*arguments.size, arguments.fit, arguments.resample)
    clips = open_clips(arguments.folder, Window(num_frames=arguments.frames), transform)
    found = {"clips": str(clips), "transform": vars(transform), "torch": torch.__version__}
    for workers in (0, 1, 2):
        batches = iter(Loader(clips, num_workers=workers))
        next(batches)  # processes have begun
        began = time.perf_counter()
        used = sum(len(batch["name"]) for batch in islice(batches, arguments.samples))
        found[f"samples a second, {workers} workers"] = used / (time.perf_counter() - began)
        batches.close()  # type: ignore[attr-defined]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
