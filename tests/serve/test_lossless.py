"""Frames bit for bit, where a client asks for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import worldline
from worldline.serve.checks import check, facts
from worldline.serve.errors import ApiError
from worldline.serve.making import Maker, write_files
from worldline.serve.records import Task
from worldline.step import Video
from worldline.video.read import read_video


def test_files(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 17, 31, 3), np.uint8)
    for asked in (True, False):
        folder = tmp_path / str(asked)
        task = Task("video_0", {"lossless": asked}, None, None, str(folder))
        write_files(folder, Video(frames, 12.5, {}), str, task)
        assert (folder / "lossless.mkv").exists() is asked
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert (read_video(tmp_path / "True" / "lossless.mkv").frames == frames).all()


def test_requests(tmp_path: Path) -> None:
    world = worldline.load("tiny-Cosmos-Predict2.5-2B")
    assert facts(world, 0.0).fields["lossless"]["default"] is False
    stated = {"prompt": "a ball", "num_video_frames": 5, "num_steps": 1, "seed": 0}
    plain, exact = (
        check(world, {**stated, **more}, None, None, None) for more in ({}, {"lossless": True})
    )
    assert exact.request == {**plain.request, "lossless": True}
    assert (exact.shape, exact.batch_key) == (plain.shape, plain.batch_key)
    with pytest.raises(ApiError) as raised:
        check(world, {**stated, "lossless": "maybe"}, None, None, None)
    assert (raised.value.code, raised.value.param) == ("invalid_value", "lossless")
    events: list[dict[str, object]] = []
    maker = Maker(world, events.append)
    task = Task("video_0", exact.request, None, None, str(tmp_path))
    maker.add([task])
    maker.run(0, [task])
    maker.finish()
    assert [event["event"] for event in events][-1] in ("done", "free")
    local = world.generate(**stated)
    assert (read_video(tmp_path / "lossless.mkv").frames == local.frames).all()
