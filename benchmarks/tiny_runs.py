"""Runs of `worldline train` on tiny worlds, and what is written about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldline.video.sheet import contact_sheet

Frames = NDArray[np.uint8]


def command(*words: str, folder: Path) -> Path:
    """Run `worldline` in a process of its own, whose runs lie in a folder; its log of figures."""
    environment = {**os.environ, "OUTPUT_ROOT": str(folder / "runs")}
    line = [sys.executable, "-m", "worldline", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    [log] = (folder / "runs").rglob("log.jsonl")
    return log


def losses(log: Path) -> dict[int, float]:
    """Step -> loss, of each line of a log."""
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def thinned(values: dict[int, float]) -> dict[int, float]:
    """Some eight of them."""
    return dict([*values.items()][:: max(1, len(values) // 8)])


def report(
    result: dict[str, Any], rows: Sequence[tuple[Frames, str]], output: Path, sheet: Path | None
) -> None:
    """Print and write a result; and, if asked for, videos with labels, one a row."""
    text = json.dumps(result, indent=1)
    output.write_text(text + "\n")
    print(text)
    if sheet is not None:
        frames, labels = zip(*rows, strict=True)
        contact_sheet(frames, sheet, labels)
