"""A video and its making as a notebook meets them."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline.inputs import joined
from worldline.video.read import probe

from . import test_world
from .conftest import moving

KINDS, load, worlds = test_world.KINDS, test_world.load, test_world.worlds  # two fixtures


def shown(video: worldline.Video, tmp_path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a video as a notebook gets it."""
    html = video._repr_html_()
    assert len(html) < 2_000_000
    found = re.search(r'<(\w+) [^>]*src="data:(\w+)/(\w+);base64,([^"]+)"', html)
    assert found
    tag, kind, suffix, data = found.groups()
    if tag == "img":
        height, width, _ = np.asarray(Image.open(BytesIO(base64.b64decode(data)))).shape
        return 1, height, width
    assert kind == tag == "video"
    path = tmp_path / f"inline.{suffix}"
    path.write_bytes(base64.b64decode(data))
    info = probe(path)
    return info.frames, info.height, info.width


def test_version() -> None:
    script = (
        "import sys, worldline; print(worldline.__version__); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.decode().strip() == version("worldline") == worldline.__version__
    assert "__version__" in dir(worldline)


def test_videos_compare_by_identity() -> None:
    first, second = (worldline.Video(moving(3), 24.0) for _ in range(2))
    assert first == first
    assert first != second
    assert first in [second, first]
    assert second not in {first: 1}
    assert repr(first) == "Video(3 frames of 64 x 40, 24 fps)"


def test_other_forms() -> None:
    video = worldline.Video(moving(3), 24.0)
    tensor, pictures = video.to_torch(), video.to_pil()
    assert (tensor.shape, tensor.dtype) == ((3, 3, 40, 64), torch.uint8)
    assert np.array_equal(tensor.permute(0, 2, 3, 1), video.frames)
    assert [np.array_equal(p, f) for p, f in zip(pictures, video.frames, strict=True)] == 3 * [True]
    tensor.zero_()
    assert video.frames.any()


@pytest.mark.parametrize("layout", ["TCHW", "CTHW", "THWC"])
@pytest.mark.parametrize("float", [False, True])
def test_tensors(layout: str, float: bool) -> None:
    video = worldline.Video(moving(3), 24.0)
    tensor = video.to_torch(layout, float)
    sizes = dict(zip("TCHW", (3, 3, 40, 64), strict=True))
    assert tensor.shape == tuple(sizes[axis] for axis in layout)
    assert tensor.is_contiguous()
    back = tensor.permute([layout.index(axis) for axis in "THWC"])
    if float:
        assert tensor.dtype == torch.float32
        assert (tensor.min() >= 0, tensor.max() <= 1) == (True, True)
        back = (back * 255).round()
    assert np.array_equal(back, video.frames)
    tensor.zero_()
    assert video.frames.any()


@pytest.mark.parametrize("layout", ["", "tchw", "TCH", "TCHWW", "NCHW", None, 4])
def test_wrong_layouts(layout: Any) -> None:
    with pytest.raises(worldline.InputError, match="layout"):
        worldline.Video(moving(3), 24.0).to_torch(layout)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((5, 32, 48), (5, 32, 48)), ((1, 32, 48), (1, 32, 48)), ((2, 720, 1280), (2, 360, 640))],
)
def test_inline_videos(
    size: tuple[int, int, int], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    assert shown(worldline.Video(np.full((*size, 3), 99, np.uint8), 24.0), tmp_path) == expected


def test_a_large_inline_video(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 180, 240, 3), np.uint8)
    frames, height, width = shown(worldline.Video(noise, 24.0), tmp_path)
    assert (frames, width / height) == (64, 4 / 3)
    assert height < 180


def test_progress(worlds: dict[str, worldline.World], capsys: pytest.CaptureFixture[str]) -> None:
    world, options = worlds["predict2.5"], KINDS["predict2.5"].options
    steps: list[worldline.Step] = []
    video = world.generate(progress=steps.append, **options)
    assert steps[-1].video is video
    assert [step.done for step in steps if step.kind == "denoise"] == [0, 1, 2, 3]
    assert not capsys.readouterr().err
    again = world.generate(progress=True, **options)
    assert np.array_equal(again.frames, video.frames)
    assert "denoise: 100%" in capsys.readouterr().err

    def stop(step: worldline.Step) -> None:
        if step.done == 2:
            raise KeyError(step.kind)

    with pytest.raises(KeyError, match="denoise"):
        world.generate(progress=stop, **options)
    with pytest.raises(worldline.InputError, match="progress is 7"):
        world.generate(progress=7, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["base", "diffusion", "predict2.5"])
def test_pictures_are_a_clip(kind: str, worlds: dict[str, worldline.World]) -> None:
    world, options, frames = worlds[kind], KINDS[kind].options, moving(9)
    pictures: list[Any] = [Image.fromarray(frame) for frame in frames]
    from_array = world.generate(frames, **options)
    for form in (torch.from_numpy(frames).permute(0, 3, 1, 2), tuple(pictures), pictures):
        made = world.generate(form, **options)
        assert np.array_equal(made.frames, from_array.frames)
    assert made.report["fingerprint"] == from_array.report["fingerprint"]
    single = world.generate(pictures[:1], **options)
    assert np.array_equal(single.frames, world.generate(pictures[0], **options).frames)


def test_pictures_of_any_mode_and_one_size() -> None:
    red = Image.new("RGB", (6, 4), "red")
    clear = red.copy()
    clear.putalpha(0)
    modes = [red, clear, red.convert("L"), red.convert("P"), red.convert("CMYK")]
    frames = joined(modes)
    assert (frames.shape, frames.dtype) == ((5, 4, 6, 3), np.uint8)
    assert frames[:, 0, 0].tolist()[:4] == [[255, 0, 0], 3 * [255], 3 * [76], [255, 0, 0]]
    for wrong, message in (
        ([*modes, red.resize((4, 6))], r"input\[5\] is 4 x 6, input\[0\] is 6 x 4"),
        ([red, "a.png"], r"input\[1\] is str"),
    ):
        with pytest.raises(worldline.InputError, match=message):
            joined(wrong)


def test_saving_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worldline.step.write_video", None)
    for name, fps, message in (
        ("a.gif", 120.0, "fps is 120, a GIF has at most 100"),
        ("a.GIF", 100.5, "fps is 100.5"),
        ("a.abc", 24.0, "cannot write .abc"),
        ("/proc/self/out/a.mp4", 24.0, "cannot be written"),
    ):
        with pytest.raises(worldline.InputError, match=message):
            worldline.Video(moving(2), fps).save(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_wrong_keywords(worlds: dict[str, worldline.World], tmp_path: Path) -> None:
    """They are type errors, as of any function, and inputs that are wrong."""
    for error in (TypeError, worldline.InputError):
        with pytest.raises(error, match=r"num_step: .*did you mean num_steps"):
            worlds["diffusion"].generate(prompt="a", num_step=2)
        with pytest.raises(error, match=r"offload_tokeniser: .*did you mean offload_tokenizer"):
            worldline.load("tiny-Cosmos-Predict1-4B", offload_tokeniser=True)


def test_messages_name_keywords(worlds: dict[str, worldline.World], tmp_path: Path) -> None:
    """Nothing that a call raises looks like a flag."""
    world, picture, clip = worlds["diffusion"], Image.new("RGB", (48, 32)), moving(9)
    root = world.opened.place.roots[0]
    calls: list[Any] = [
        lambda: world.generate(clip, prompt="a", height=33),
        lambda: world.generate(clip, prompt="a", seed=-1),
        lambda: world.generate(clip, prompt="a", num_input_frames=0),
        lambda: world.generate(picture, prompt="a", input_type="video"),
        lambda: world.generate(picture, prompt="a", num_input_frames=9),
        lambda: world.generate(prompt="a"),
        lambda: world.generate(clip),
        lambda: worldline.load("absent", checkpoint_dir=root),
        lambda: worldline.load(world.name, checkpoint_dir=root),
        lambda: worldline.load(world.name, checkpoint_dir=root, tokenizer_dir="absent"),
        lambda: worldline.load(world.name, checkpoint_dir=root, dtype="int8"),
        lambda: worldline.load(
            KINDS["base"].name, checkpoint_dir=worlds["base"].opened.place.roots[0]
        ),
    ]
    for call in calls:
        with pytest.raises(worldline.InputError) as caught:
            call()
        assert not re.search(r"(?<![\w-])--\w", str(caught.value)), caught.value
    assert "--" not in (worldline.load.__doc__ or "") + (worldline.World.generate.__doc__ or "")
