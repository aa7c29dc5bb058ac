"""The client of `worldline.connect` against `worldline serve` itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import worldline
from tests.serve.served import Served
from worldline.client.wire import RemoteError
from worldline.errors import InputError
from worldline.video.read import read_video

pytestmark = pytest.mark.slow

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"
NAME, AR = "tiny-Cosmos-Predict2.5-2B", "tiny-Cosmos-Predict1-4B"
KEY = "a-key-of-tests"
OPTIONS = {"prompt": "a ball", "num_video_frames": 9, "num_steps": 2, "guidance": 0.0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"), NAME, AR, key=KEY)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def remote(served: Served) -> worldline.RemoteWorld:
    with pytest.raises(InputError):
        worldline.connect(served.url, "wrong", model=NAME)
    return worldline.connect(served.url, KEY, model=NAME)


@pytest.fixture(scope="module")
def local() -> worldline.World:
    return worldline.load(NAME)


@pytest.mark.parametrize("kind", ["none", "picture", "frames", "pictures", "file"])
def test_equal_frames(remote: worldline.RemoteWorld, local: worldline.World, kind: str) -> None:
    frames = read_video(CLIP).frames[:6]
    pictures = [Image.fromarray(frame) for frame in frames]
    given: Any = {"picture": pictures[0], "frames": frames, "pictures": pictures, "file": CLIP}
    steps = [*remote.stream(given.get(kind), **OPTIONS)]
    made, expected = steps[-1].video, local.generate(given.get(kind), **OPTIONS)
    assert made is not None
    assert np.array_equal(made.frames, expected.frames)
    assert (made.fps, made.prompt) == (expected.fps, expected.prompt)
    assert made.report["lossless"] is True
    assert made.report["frames_sha256"] == expected.report["frames_sha256"]
    assert made.report["request"]["seed"] == expected.report["request"]["seed"]


def test_an_autoregressive_world(served: Served) -> None:
    options: dict[str, Any] = {"num_input_frames": 9, "seed": 3}
    made = worldline.connect(served.url, KEY, model=AR).generate(CLIP, **options)
    assert np.array_equal(made.frames, worldline.load(AR).generate(CLIP, **options).frames)


@pytest.mark.parametrize(
    "options",
    [
        *({"num_steps": 0}, {"num_step": 3}, {"width": 7}, {"temperature": 1.0}, {"prompt": ""}),
        *({"seed": -1}, {"num_video_frames": 6}, {"num_video_frames": 10**6}, {"guidance": "x"}),
        *({"height": 10**5, "width": 10**5}, {"fit": "bend"}, {"num_steps": True}),
    ],
)
def test_equal_errors(
    remote: worldline.RemoteWorld, local: worldline.World, options: dict[str, Any]
) -> None:
    for world in (remote, local):
        with pytest.raises(InputError) as raised:
            world.stream(**{"prompt": "x", **options})
        assert next(iter(options)) in str(raised.value)


def test_closing_frees_the_worker(remote: worldline.RemoteWorld) -> None:
    for step in remote.stream(prompt="x", num_steps=1000, num_video_frames=9):
        if step.kind == "denoise":
            break
    assert remote.generate(**OPTIONS).frames.shape[0] == 9  # it does not wait for 1,000 steps


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    server = Served(tmp_path, NAME)
    world = worldline.connect(server.url, KEY)
    again = None
    try:
        for step in world.stream(prompt="x", num_steps=60, num_video_frames=9, guidance=0.0):
            if step.kind == "denoise" and step.done > 3 and again is None:
                server.stop(signal.SIGKILL)
                again = Served(tmp_path, NAME, port=int(server.url.rpartition(":")[2]))
        assert step.video is not None
    finally:
        (again or server).stop()
    with pytest.raises(RemoteError):
        worldline.connect(server.url, KEY)
