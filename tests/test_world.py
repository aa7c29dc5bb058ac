"""The Python interface of the README, on the small world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from worldline.machine import Memory
from worldline.world.autoregressive import AutoregressiveWorld
from worldline.world.safety import Safety

import worldline
from worldline import machine
from worldline.video.read import read_image, read_video
from worldline.world import read_clip

from .conftest import MODEL, moving


@pytest.fixture(scope="module")
def world(small_world: Path) -> worldline.World:
    return worldline.load(
        MODEL, small_world, disable_guardrail=True, disable_diffusion_decoder=True
    )


def test_generate_and_save(world: worldline.World, clip: Path, tmp_path: Path) -> None:
    video = world.generate(clip, seed=1, top_p=0.9, temperature=0.7, num_input_frames=9)
    assert isinstance(video, worldline.Video)
    assert video.frames.shape == (33, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.fps == 25
    path = video.save(tmp_path / "new" / "out.mp4")
    assert len(read_video(path).frames) == 33
    report = json.loads(path.with_suffix(".json").read_text())
    assert report == video.report
    assert report["request"]["temperature"] == 0.7


def test_every_form_of_input(world: worldline.World, clip: Path, image: Path) -> None:
    frames = read_video(clip).frames
    from_file = world.generate(str(clip)).frames
    for form in (clip, frames, torch.from_numpy(frames)):
        assert np.array_equal(world.generate(form).frames, from_file)
    picture = read_image(image).frames
    from_image = world.generate(image).frames
    assert np.array_equal(world.generate(Image.fromarray(picture[0])).frames, from_image)
    one_frame = world.generate(frames, num_input_frames=1).report
    assert one_frame["tokens"] == 24


def test_a_video_that_finds_no_room(
    world: worldline.World, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is made, of one clip and of clips in step."""
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(10**9, 2 * 10**9))
    message = r"num_video_frames is 250001: all frames of 32 x 48 pixels take 1\.2 GB of host"
    with pytest.raises(worldline.InsufficientMemoryError, match=message):
        world.stream(clip, num_video_frames=250_001)
    assert isinstance(world, AutoregressiveWorld)
    with pytest.raises(worldline.InsufficientMemoryError, match=message):
        world.stream_batch([clip, clip], [{}, {}], num_video_frames=250_001)
    half = {"num_video_frames": 125_001}
    world.stream_batch([clip, clip], [{}, {}], **half)
    with pytest.raises(worldline.InsufficientMemoryError, match=r"1\.2 GB.* \(2 videos in step\)"):
        world.stream_batch([clip, clip], [{}, {}], **half, rollout="pixels")
    monkeypatch.setattr(Safety, "checks_videos", True)
    with pytest.raises(worldline.InsufficientMemoryError, match=r"1\.2 GB.* \(twice, for the "):
        world.stream(clip, **half)


@pytest.mark.parametrize("rollout", ["tokens", "pixels"])
@pytest.mark.parametrize("clips", [1, 2])
def test_frames_are_held_once(rollout: str, clips: int, world: worldline.World, clip: Path) -> None:
    """The pieces that are shown lie in the video that is made of them."""
    assert isinstance(world, AutoregressiveWorld)
    each = [{"seed": number} for number in range(clips)]
    shown: dict[int, list[Any]] = {number: [] for number in range(clips)}
    options = {"num_video_frames": 57, "rollout": rollout}
    for number, step in world.stream_batch([clip] * clips, each, **options):
        if step.video is not None:
            assert sum(map(len, shown[number])) == 57
            assert all(np.shares_memory(piece, step.video.frames) for piece in shown[number])
        elif step.frames is not None:
            shown[number].append(step.frames)


def test_only_the_last_frames_count(world: worldline.World) -> None:
    frames = moving(20)
    changed = frames.copy()
    changed[:11] = 0
    assert np.array_equal(world.generate(frames).frames, world.generate(changed).frames)


def test_same_seed_same_video(world: worldline.World, clip: Path) -> None:
    first, again, other = (world.generate(clip, seed=seed, top_p=1.0).frames for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stream(world: worldline.World, clip: Path) -> None:
    steps = list(world.stream(clip))
    assert all(isinstance(step, worldline.Step) for step in steps)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["encode", "tokens", "done"]
    tokens = [step for step in steps if step.kind == "tokens"]
    assert [step.done for step in tokens] == list(range(1, 19))
    assert {step.total for step in tokens} == {18}
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].frames is steps[-1].video.frames  # type: ignore[union-attr]


def test_frames_come_as_latent_frames_complete(world: worldline.World, clip: Path) -> None:
    steps = list(world.stream(clip, num_video_frames=49))
    told = [(step.done, len(step.frames)) for step in steps[:-1] if step.frames is not None]
    # 6 tokens a latent frame; the first to be complete brings the given ones along
    assert told == [(6, 17), (12, 8), (18, 8), (24, 8), (30, 8)]
    frames = np.concatenate([step.frames for step in steps[:-1] if step.frames is not None])
    assert steps[-1].video is not None
    assert np.array_equal(frames, steps[-1].video.frames)


def test_a_stream_may_be_left(world: worldline.World, clip: Path) -> None:
    whole = world.generate(clip).frames
    steps = world.stream(clip)
    for step in steps:
        if step.kind == "tokens":
            break
    del steps
    assert np.array_equal(world.generate(clip).frames, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"num_input_frames": 5}, "num_input_frames is 5"),
        ({"num_frames": 5}, "unknown option num_frames"),
        ({"num_frames": 5, "num_input_frames": 1.5}, "unknown option num_frames"),
        ({"input_type": "image"}, "is a video, but the input type is image"),
        ({"input_type": "foo"}, "input_type is 'foo'"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"top_p": None}, "top_p is None; it must be a number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"num_input_frames": "9"}, "num_input_frames is '9'; it must be a whole number"),
    ],
)
def test_wrong_options(
    options: dict[str, object], message: str, world: worldline.World, clip: Path
) -> None:
    with pytest.raises(worldline.InputError, match=message):
        world.generate(clip, **options)


def test_wrong_inputs(world: worldline.World, short_clip: Path) -> None:
    with pytest.raises(worldline.InputError, match="has 5 frames"):
        world.generate(short_clip)
    with pytest.raises(worldline.InputError, match="has 3 frames"):
        world.generate(moving(3))
    for wrong in (
        moving(9).astype(np.float32),
        moving(9)[..., :2],
        moving(1)[0],
        moving(9)[:, :0],
        moving(9)[:0],
        torch.zeros(9, 4, 4, 3),
    ):
        with pytest.raises(worldline.InputError, match=r"uint8 \(T, H, W, 3\)"):
            world.generate(wrong)
    for nothing, told in (
        ([], "the input is a list"),
        (None, "no input is given"),
        (b"in.mp4", "the input is a bytes"),
        (3, "the input is a int"),
    ):
        for input_type in (None, "video", "image"):
            with pytest.raises(worldline.InputError, match=f"{told}; it must be"):
                world.generate(nothing, input_type=input_type)  # type: ignore[arg-type]
    with pytest.raises(worldline.InputError, match="image 4 x 4 is an image, but the input type"):
        world.generate(Image.new("RGB", (4, 4)), input_type="video")
    with pytest.raises(worldline.InputError, match="image 0 x 4 has no pixels"):
        world.generate(Image.new("RGB", (0, 4)))
    with pytest.raises(worldline.InputError, match="null"):
        world.generate("in\0.mp4")


def test_numbers_of_numpy(world: worldline.World, clip: Path) -> None:
    given = {"seed": np.int64(3), "temperature": np.float32(0.5), "num_input_frames": np.int8(9)}
    report = world.generate(clip, **given).report
    assert json.loads(json.dumps(report["request"])) == {
        "num_input_frames": 9,
        "temperature": 0.5,
        "top_p": 0.8,
        "seed": 3,
        "decoder_seam": "corrected",
        "num_video_frames": None,
        "rollout": "tokens",
    }


def test_an_image_has_one_frame(
    world: worldline.World, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="worldline"):
        world.generate(image)
        assert "has no effect" not in caplog.text
        assert world.generate(image, num_input_frames=9).report["tokens"] == 24
    assert "num_input_frames has no effect: an image has 1 frame" in caplog.text


def test_pictures_are_read_like_files(world: worldline.World, tmp_path: Path) -> None:
    """Alpha over white, 16-bit grey scaled, EXIF orientation applied."""
    picture = moving(1)[0]
    alpha = Image.fromarray(np.dstack([picture, picture[..., 0]]))
    grey = Image.fromarray(picture[..., 0].astype(np.uint16) * 257)
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 6
    for number, (form, options) in enumerate(
        ((alpha, {}), (grey, {}), (turned, {"exif": turned.getexif()}))
    ):
        path = tmp_path / f"{number}.png"
        form.save(path, **options)
        expected = read_image(path).frames
        assert np.array_equal(read_clip(form, "image", 1).frames, expected)
        with Image.open(path) as opened:
            assert np.array_equal(read_clip(opened, "image", 1).frames, expected)
    path = tmp_path / "cut.jpg"
    turned.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(worldline.InputError, match="is a damaged image"), Image.open(path) as cut:
        world.generate(cut)


def test_tensors_are_brought_to_the_cpu() -> None:
    frames = torch.from_numpy(moving(9))
    assert np.array_equal(read_clip(frames, "video", 9).frames, moving(9))


@pytest.mark.gpu
def test_tensors_of_a_gpu() -> None:
    frames = torch.from_numpy(moving(9)).cuda()
    assert np.array_equal(read_clip(frames, "video", 9).frames, moving(9))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16"])
def test_dtypes_to_compute_in(dtype: Any, small_world: Path) -> None:
    with pytest.raises(worldline.InputError, match=r"it must be one of torch\.bfloat16"):
        worldline.load(small_world / MODEL, dtype=dtype)


def test_a_grid_without_a_frame_to_make(own_world: Path, clip: Path, image: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [2, 2, 3]}))
    short = worldline.load(MODEL, own_world, disable_guardrail=True, disable_diffusion_decoder=True)
    with pytest.raises(worldline.InputError, match=r"makes 9 frames, .*--num_input_frames 1"):
        short.stream(clip)
    assert len(short.generate(image).frames) == 9


def test_load_twice(small_world: Path) -> None:
    """The function is still the function once its modules are imported."""
    for _ in range(2):
        loaded = worldline.load(
            small_world / MODEL, disable_guardrail=True, disable_diffusion_decoder=True
        )
        assert loaded.name == MODEL
    assert callable(worldline.load)


def test_released_parts_are_refused_by_name(small_world: Path) -> None:
    with pytest.raises(worldline.InputError, match="disable_guardrail=True"):
        worldline.load(MODEL, small_world, disable_diffusion_decoder=True)
