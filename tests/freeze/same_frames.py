"""Twelve small requests give the same frames, bit for bit, in a base commit and in this tree.

    python tests/freeze/same_frames.py [--base COMMIT] [NAME ...]

Both trees run on this machine, one after the other, since float32 on a CPU depends on its
processor: nothing is stored. Requests go through `worldline.load` and the world's public methods.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BASE = "7f4d740"
ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 128, 192  # of the bundled worlds
PROMPT = "A red ball rolls to the right and hits a blue box."

BASE_WORLD = "tiny-Cosmos-Predict1-4B"
PROMPTED = "tiny-Cosmos-Predict1-5B-Video2World"
DIFFUSION = "tiny-Cosmos-Predict1-7B-Video2World"
FLOW = "tiny-Cosmos-Predict2.5-2B"
BY_TOKENIZER = {"disable_diffusion_decoder": True}


class Request(NamedTuple):
    """A request as the public interface takes it.

    Attributes:
        world: bundled world.
        frames: input frames; 0 is no input.
        options: keyword arguments of `generate`.
        load: keyword arguments of `worldline.load`.
        seeds: seeds of clips that are drawn in step; empty for a single clip.
    """

    world: str
    frames: int
    options: dict[str, Any]
    load: dict[str, Any] = {}  # noqa: RUF012
    seeds: tuple[int, ...] = ()


_SMALL: dict[str, Any] = {"num_video_frames": 17, "num_steps": 4, "prompt": PROMPT, "seed": 3}

REQUESTS = {
    "autoregressive, image, greedy": Request(
        BASE_WORLD, 1, {"temperature": 0, "num_input_frames": 1}, BY_TOKENIZER
    ),
    "autoregressive, clip, longer by tokens": Request(
        BASE_WORLD, 12, {"num_video_frames": 49, "seed": 1, "rollout": "tokens"}, BY_TOKENIZER
    ),
    "autoregressive, clip, longer by pixels": Request(
        BASE_WORLD,
        9,
        {"num_video_frames": 49, "seed": 2, "rollout": "pixels", "top_p": 1, "temperature": 0.7},
        BY_TOKENIZER,
    ),
    "autoregressive, clips in step": Request(BASE_WORLD, 9, {}, BY_TOKENIZER, seeds=(5, 6, 7)),
    "autoregressive, diffusion decoder": Request(BASE_WORLD, 9, {"seed": 3}),
    "autoregressive, prompt": Request(PROMPTED, 9, {"prompt": PROMPT, "seed": 4}, BY_TOKENIZER),
    "autoregressive, prompt, diffusion decoder": Request(
        PROMPTED, 1, {"prompt": PROMPT, "seed": 5, "num_input_frames": 1}
    ),
    "diffusion, text": Request(
        DIFFUSION, 0, _SMALL | {"guidance": 3.0, "negative_prompt": "blurry"}
    ),
    "diffusion, clip": Request(
        DIFFUSION, 12, _SMALL | {"num_input_frames": 9, "num_video_frames": 33}
    ),
    "predict2.5, text": Request(FLOW, 0, _SMALL | {"guidance": 3.0, "negative_prompt": "blurry"}),
    "predict2.5, image, long": Request(
        FLOW,
        1,
        _SMALL
        | {"num_input_frames": 1, "num_video_frames": 50, "chunk_size": 33, "chunk_overlap": 5},
    ),
    "predict2.5, clip": Request(FLOW, 9, _SMALL | {"num_input_frames": 5}),
}


def draw(frames: int, shift: int = 0) -> NDArray[np.uint8]:
    """Disc that moves over a drifting texture: uint8 (T, H, W, 3)."""
    t, y, x = np.meshgrid(
        np.arange(frames) + shift, np.arange(HEIGHT), np.arange(WIDTH), indexing="ij"
    )
    picture = np.stack([40 + x // 2 + 2 * t, 180 - y, 90 + (x * y // 64) % 32], axis=-1)
    disc = (x - 30 - 4 * t) ** 2 + (y - 70 - t) ** 2 < 400
    picture[disc] = (220, 60, 40)
    return picture.clip(0, 255).astype(np.uint8)


def run(request: Request) -> NDArray[np.uint8]:
    """Frames of a request; those of clips in step lie behind each other."""
    import worldline

    world = worldline.load(request.world, device="cpu", **request.load)
    if request.seeds:
        clips = [draw(request.frames, shift) for shift in range(len(request.seeds))]
        each = [{"seed": seed} for seed in request.seeds]
        steps: Any = world.stream_batch(clips, each, **request.options)
        made = {number: step.video.frames for number, step in steps if step.video is not None}
        return np.concatenate([made[number] for number in range(len(clips))])
    source = draw(request.frames) if request.frames else None
    frames: NDArray[np.uint8] = world.generate(source, **request.options).frames
    return frames


def run_tree(names: list[str], folder: Path) -> None:
    """Run requests with the `worldline` on the path; write the frames of each to `folder`."""
    import torch

    import worldline

    torch.set_num_threads(1)
    print(f"{Path(worldline.__file__).parent}")
    for name in names:
        begin = time.perf_counter()
        try:
            np.save(folder / f"{name}.npy", run(REQUESTS[name]))
        except Exception:  # the others are compared nevertheless
            traceback.print_exc()
        print(f"  {time.perf_counter() - begin:5.1f} s  {name}", flush=True)


def start(tree: Path, names: list[str], folder: Path) -> None:
    """Run requests in a process of their own, by the sources of a tree."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "WORLDLINE_CACHE": str(folder / "cache"),  # each tree encodes its prompts itself
    }
    words = [sys.executable, __file__, "--write", str(folder), *names]
    subprocess.run(words, env=environment, cwd=folder, check=True)


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Working tree of a commit, removed in the end."""
    git = ["git", "-C", str(ROOT)]
    subprocess.run(
        [*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def compare(name: str, base: Path, head: Path) -> bool:
    """Print how the frames of a request differ; whether they are equal."""
    files = [folder / f"{name}.npy" for folder in (base, head)]
    missing = [file.parent.name for file in files if not file.exists()]
    if missing:
        print(f"FAILED     {name}: in {' and '.join(missing)}")
        return False
    old, new = map(np.load, files)
    if old.shape != new.shape:
        print(f"DIFFERENT  {name}: shapes {old.shape} and {new.shape}")
        return False
    if not np.array_equal(old, new):
        apart = np.abs(old.astype(int) - new)
        print(
            f"DIFFERENT  {name}: {np.count_nonzero(apart)} of {apart.size} values, by at most "
            f"{apart.max()}, first in frame {int(apart.reshape(len(apart), -1).any(1).argmax())}"
        )
        return False
    print(f"same       {name}: {len(old)} frames")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="Requests; by default all.")
    parser.add_argument("--base", default=BASE, help="Commit to compare with.")
    parser.add_argument("--write", type=Path, help="Only write the frames of the current path.")
    arguments = parser.parse_args()
    names = arguments.names or list(REQUESTS)
    if unknown := set(names) - set(REQUESTS):
        parser.error(f"unknown requests {sorted(unknown)}; there are {list(REQUESTS)}")
    if arguments.write:
        run_tree(names, arguments.write)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with worktree(arguments.base, folder / "tree") as tree:
            start(tree, names, folder / "base")
        start(ROOT, names, folder / "head")
        equal = [compare(name, folder / "base", folder / "head") for name in names]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
