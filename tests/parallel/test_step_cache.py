"""Processes that share a video compute the same steps, those that one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import worlds
from tests.families.worlds import CPU
from tests.parallel.test_context import CONTEXT, HALVES, P25, T2W, arranged
from tests.ranks import Together
from tests.tiny_diffusion import TEXT2WORLD
from tests.tiny_predict2_5 import POST
from worldline.parallel.mesh import Axis, Layout
from worldline.report import Recorder


def cached(
    axis: Axis, model: str, folder: Path, layout: Layout, options: dict[str, Any]
) -> tuple[float, Any, Any]:
    """How far frames are off those of one process, and which steps each computed."""
    parts, frames, entries = worlds.load_named(model, folder), list[Any](), list[Any]()
    for each in (parts, arranged(axis, parts, layout)):
        recorder = Recorder(CPU)
        frames.append(worlds.frames_of(worlds.run(each, None, recorder, **options)).astype(int))
        entries.append(recorder.facts["step_cache"])
    return np.abs(frames[0] - frames[1]).max() if axis.first else 0, *entries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout", "rule"),
    [
        (TEXT2WORLD, HALVES, "0.3"),
        (TEXT2WORLD, CONTEXT, "0.3"),
        (POST.name, CONTEXT, "0.3"),
        (POST.name, HALVES, "steps:0,2,5"),
    ],
)
def test_two_processes(
    two: Together,
    tiny_diffusion: Path,
    tiny_predict2_5: Path,
    model: str,
    layout: Layout,
    rule: str,
) -> None:
    # the schedule of POST evaluates once more than it is asked
    old = model == TEXT2WORLD
    folder, options = (tiny_diffusion, T2W) if old else (tiny_predict2_5, P25)
    options = {**options, "guidance": 3.0, "num_steps": 6 - (not old), "step_cache": rule}
    for off, alone, shared in two(cached, model, folder, layout, options):
        assert off <= 1
        assert alone == shared
        assert 2 <= alone["computed"] < alone["steps"] == 6
