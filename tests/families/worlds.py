"""Tiny worlds that are opened, loaded and run without what stands around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldline.family import Compute, Opened, Parts
from worldline.locate import locate
from worldline.opening import load_parts, open_world
from worldline.report import Recorder
from worldline.step import Step
from worldline.video.read import Clip

from ..conftest import moving

CPU = torch.device("cpu")
PLAIN = Compute(CPU, torch.float32, torch.float32, fused=False)
PROMPT = "a red ball rolls"


def open_named(name: str | Path, folder: str | Path, **options: Any) -> Opened:
    return open_world(locate(name, folder), options)


def load_named(name: str | Path, folder: str | Path, **options: Any) -> Parts:
    return load_parts(open_named(name, folder, **options), PLAIN, Recorder(CPU))


def reopened(parts: Parts, /, **changes: Any) -> Parts:
    """The same networks of a model that differs in `changes`."""
    return replace(parts, opened=replace(parts.opened, **changes))


def without_text(parts: Parts) -> Parts:
    """The same networks without the text encoder, which none may ask then."""
    return replace(parts, loaded={n: part for n, part in parts.loaded.items() if n != "text"})


def checked(opened: Opened, **options: Any) -> Any:
    """A request, checked against the opened files."""
    return opened.family.check(opened, opened.family.request.parse(options))


def run(
    parts: Parts, clip: Clip | None = None, recorder: Recorder | None = None, **options: Any
) -> list[Step]:
    family, request = parts.opened.family, checked(parts.opened, **options)
    recorder = recorder or Recorder(CPU)
    if family.generate is not None:
        return list(family.generate(parts, clip, request, recorder))
    assert family.generate_together is not None
    jobs = [SimpleNamespace(clip=clip, request=request, recorder=recorder)]
    return [step for _, step in family.generate_together(parts, jobs, recorder)]


def frames_of(steps: list[Step]) -> NDArray[np.uint8]:
    """Frames of the last step."""
    assert steps[-1].frames is not None
    return steps[-1].frames


def pieces_of(steps: list[Step], kind: str = "decode") -> NDArray[np.uint8]:
    """Frames as they came, joined."""
    pieces = [step.frames for step in steps if step.kind == kind and step.frames is not None]
    return np.concatenate(pieces)


def clip(frames: int = 12) -> Clip:
    return Clip(moving(frames), 25.0)
