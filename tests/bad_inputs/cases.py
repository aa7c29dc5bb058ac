"""What a bad input is, and the folder of small worlds that most of them are put into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from worldline.video.write import write_video

BUNDLED = Path(str(files("worldline"))) / "bundled"
FLOW, DIT, AR = "Cosmos-Predict2.5-2B", "Cosmos-Predict1-7B-Video2World", "Cosmos-Predict1-4B"
PROMPTED = "Cosmos-Predict1-5B-Video2World"
CV = "Cosmos-Tokenize1-CV8x8x8-720p"


@dataclass(frozen=True)
class Case:
    """A command line that must be refused.

    Attributes:
        name: of the case, unique.
        make: writes the files below the current folder; the words of the command line.
        names: texts that the message must contain.
        statuses: exit statuses that are right.
        environment: variables of the command.
    """

    name: str
    make: Callable[[], list[str]]
    names: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (1, 2)
    environment: dict[str, str] = field(default_factory=dict)


def make_worlds(copied: str = "") -> Path:
    """Folder `checkpoints` of the bundled worlds, links but for the model or tokenizer `copied`."""
    root = Path("checkpoints")
    root.mkdir()
    for path in BUNDLED.iterdir():
        if path.name == copied:
            shutil.copytree(path, root / path.name)
        else:
            (root / path.name).symlink_to(path)
    (root / "nvidia").unlink()
    shutil.copytree(BUNDLED / "nvidia", root / "nvidia")  # guardrails may be added
    return root


@cache
def clip_bytes() -> bytes:
    """An MP4 of 12 frames."""
    path = Path("clip.mp4")
    write_video(moving(), path, 25)
    data = path.read_bytes()
    path.unlink()
    return data


def moving(frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours that drift."""
    t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
    channels = (40 + 2 * x + 3 * t, 200 - 2 * y, 90 + y + x // 2)
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def clip() -> str:
    Path("clip.mp4").write_bytes(clip_bytes())
    return "clip.mp4"


def generate(model: str, source: str | None = None, *more: str) -> list[str]:
    """Words that continue a clip with a model of `checkpoints`, in a step of few frames."""
    disable = "--disable_guardrails" if model == FLOW else "--disable_guardrail"
    words = ["generate", f"checkpoints/{model}", "--checkpoint_dir", "checkpoints", disable]
    if source != "":
        words.insert(2, source or clip())
    if model == DIT:
        words.append("--disable_prompt_upsampler")
    if model == AR:
        words.append("--disable_diffusion_decoder")
    else:
        words += ["--prompt", "a ball", "--num_steps", "1", "--num_video_frames", "9"]
    return [*words, "--output", "out/made.mp4", *more]
