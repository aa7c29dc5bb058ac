"""The Python interface on the tiny worlds of Predict2.5."""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline import machine
from worldline.errors import InsufficientMemoryError
from worldline.loading import find_autoregressive, find_diffusion, find_predict2_5
from worldline.locate import bundled_names
from worldline.machine import Memory
from worldline.locate import bundled_names
from worldline.video.read import read_image, read_video
from worldline.weights.write import save
from worldline.world import FlowWorld

from .conftest import MODEL as AUTOREGRESSIVE
from .offloading import check_offloading
from .tiny_diffusion import TEXT2WORLD
from .tiny_predict2_5 import CONFIG, POST, PRE, SMALL, TEXT_LENGTH

PROMPT = "a red ball rolls"


def load(folder: Path, name: str = POST.name, **options: Any) -> FlowWorld:
    world = worldline.load(name, folder, disable_guardrails=True, video=(9, 32, 48), **options)
    assert isinstance(world, FlowWorld)
    return world


@pytest.fixture(scope="module")
def world(tiny_predict2_5: Path) -> FlowWorld:
    return load(tiny_predict2_5)


def test_generate_and_save(world: FlowWorld, tmp_path: Path) -> None:
    video = world.generate(prompt=PROMPT, **SMALL)
    assert isinstance(video, worldline.Video)
    assert (video.frames.shape, video.frames.dtype) == ((9, 32, 48, 3), np.uint8)
    assert (video.fps, video.prompt) == (16, PROMPT)
    path = video.save(tmp_path / "new" / "out.mp4")
    assert len(read_video(path).frames) == 9
    assert json.loads(path.with_suffix(".json").read_text()) == video.report


def test_one_frame_is_saved_as_a_picture(world: FlowWorld, tmp_path: Path) -> None:
    picture = world.generate(prompt=PROMPT, **{**SMALL, "num_video_frames": 1})
    path = picture.save(tmp_path / "out.jpg")
    assert read_image(path).frames.shape == (1, 32, 48, 3)
    with pytest.raises(worldline.InputError, match="a picture has 1 frame, not 9"):
        world.generate(prompt=PROMPT, **SMALL).save(tmp_path / "more.jpg")


def test_the_report_tells_all(world: FlowWorld, clip: Path) -> None:
    report = world.generate(clip, prompt=PROMPT, **SMALL).report
    assert report["model"] == POST.name
    assert (report["schedule"], report["known_timestep"]) == ("karras", 0.1)
    assert (report["evaluations"], report["chunks"], report["tokens"]) == (3, 1, 18)
    assert report["request"]["num_input_frames"] == 5
    assert report["attention"]
    assert len(report["seconds_of_steps"]) == 3
    assert report["offload"] == dict.fromkeys(
        ("diffusion_model", "tokenizer", "text_encoder"), False
    )
    assert {"transformer", "tokenizer", "text_encoder", "input"} <= report["files"].keys()
    stages = [stage["name"] for stage in report["run"]["stages"]]
    assert stages == ["read", "text", "encode", "denoise", "decode"]


def test_the_report_tells_which_prompts_are_cut(world: FlowWorld) -> None:
    assert world.parts.text is not None
    chat = world.parts.text.files.count_tokens("")
    letters = TEXT_LENGTH - chat  # of a prompt that the chat leaves room for
    for prompt, negative in ((0, 0), (0, 3), (1, 2)):  # letters beyond
        words = {"prompt": "a" * (letters + prompt), "negative_prompt": "b" * (letters + negative)}
        expected = {
            name: {"max_length": TEXT_LENGTH, "num_truncated_tokens": count}
            for name, count in (("prompt", prompt), ("negative_prompt", negative))
            if count
        }
        for _ in range(2):  # the second time their embeddings are in the cache
            report = world.generate(**words, **SMALL).report
            assert report["prompt_truncation"] == expected
    unread = world.generate(**words, **{**SMALL, "guidance": 0}).report["prompt_truncation"]
    assert unread.keys() == {"prompt"}


def test_every_form_of_input(world: FlowWorld, clip: Path, image: Path) -> None:
    frames = read_video(clip).frames
    options = {"prompt": PROMPT, **SMALL}
    from_file = world.generate(str(clip), **options).frames
    for form in (clip, frames, torch.from_numpy(frames)):
        assert np.array_equal(world.generate(form, **options).frames, from_file)
    picture = read_image(image).frames
    from_image = world.generate(image, **options).frames
    assert np.array_equal(world.generate(Image.fromarray(picture[0]), **options).frames, from_image)
    given = world.generate(picture, num_input_frames=1, **options)
    assert np.array_equal(given.frames, from_image)


def test_stream(world: FlowWorld) -> None:
    steps = list(world.stream(prompt=PROMPT, preview_every=2, **SMALL))
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "denoise", "decode", "done"]
    assert sum(step.preview is not None for step in steps) == 1
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]


def test_a_long_video(world: FlowWorld) -> None:
    options = {**SMALL, "num_video_frames": 20, "chunk_size": 13}
    video = world.generate(prompt=PROMPT, **options)
    assert len(video.frames) == 20
    assert video.report["chunks"] == 2
    # of what is denoised at once
    assert video.report["tokens"] == 24 * 2 * 3


def test_a_video_that_finds_no_room(world: FlowWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is made, and nothing at all is held for it."""
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(10**9, 2 * 10**9))
    options = {**SMALL, "num_video_frames": 250_000, "chunk_size": 13}
    message = r"num_video_frames is 250000: all frames of 32 x 48 pixels take 1\.2 GB of host"
    with pytest.raises(InsufficientMemoryError, match=message):
        world.stream(prompt=PROMPT, **options)


def test_a_world_that_finds_no_room_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(1, 10**9))
    for name in bundled_names():
        with pytest.raises(InsufficientMemoryError, match=f"^{re.escape(name)} needs about"):
            worldline.load(name)


def test_embeddings_in_place_of_a_prompt(world: FlowWorld, tmp_path: Path) -> None:
    words = torch.randn(5, CONFIG.feature_width)
    save({"prompt": words, "negative_prompt": -words}, tmp_path / "words.safetensors")
    video = world.generate(prompt_embeddings=tmp_path / "words.safetensors", **SMALL)
    assert video.prompt is None
    stamp = video.report["files"]["prompt_embeddings"]
    assert stamp["path"] == str(tmp_path / "words.safetensors")
    given = {"prompt_embeddings": words, "negative_prompt_embeddings": -words}
    same = world.generate(**given, **SMALL)
    assert np.array_equal(same.frames, video.frames)
    with pytest.raises(worldline.InputError, match="must be floating and finite"):
        world.generate(prompt_embeddings=words / 0, **SMALL)


def test_names_folders_and_schedules(tiny_predict2_5: Path, own_predict2_5: Path) -> None:
    root = tiny_predict2_5 / Path(POST.repository).name
    for name in (root.name, root / POST.file, (root / POST.file).parent):
        assert load(tiny_predict2_5, str(name)).name == POST.name
    assert load(tiny_predict2_5, PRE.name).files.rules.schedule == "shifted"
    chosen = load(tiny_predict2_5, PRE.name, schedule="karras")
    assert chosen.files.rules.known_timestep == 0.1
    (root_of := own_predict2_5 / root.name / POST.file).rename(own_predict2_5 / "mine.pt")
    assert load(own_predict2_5, "mine.pt").files.rules.schedule == "shifted"
    assert not root_of.exists()


OFFLOADED = {
    "offload_text_encoder": "Reason1Encoder",
    "offload_tokenizer": "WanTokenizer",
    "offload_diffusion_model": "FlowDiT",
}


@pytest.mark.parametrize("flags", [tuple(OFFLOADED), *((flag,) for flag in OFFLOADED)])
def test_what_is_offloaded_is_there_while_it_is_used(
    flags: tuple[str, ...], tiny_predict2_5: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"prompt": PROMPT, **SMALL, "preview_every": 2}
    options |= {"num_video_frames": 20, "chunk_size": 13}  # two chunks
    used = ("Reason1Encoder", *(2 * ("WanTokenizer", "FlowDiT", "WanTokenizer")))
    make = partial(load, tiny_predict2_5)
    check_offloading(make, clip, options, OFFLOADED, used, flags, monkeypatch)


def test_another_dtype(tiny_predict2_5: Path, clip: Path) -> None:
    video = load(tiny_predict2_5, dtype=torch.bfloat16).generate(clip, prompt=PROMPT, **SMALL)
    assert (video.report["dtype"], video.report["text_encoder_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no prompt; give one, or prompt_embeddings"),
        ({"prompt": "x", "steps": 3}, "unknown option steps; there are: input_type, prompt, "),
        ({"prompt": "x", "num_input_frames": 1}, "num_input_frames is 1, but there is no input"),
        ({"prompt": "x", "height": 33}, "height is 33"),
        ({"prompt": "x", "num_video_frames": 10}, "num_video_frames is 10; it must be 1"),
        ({"prompt_embeddings": torch.ones(3, 3)}, r"prompt_embeddings is float32 \(3, 3\)"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, world: FlowWorld) -> None:
    with pytest.raises(worldline.InputError, match=message):
        world.stream(**options)


def test_wrong_inputs(world: FlowWorld, image: Path) -> None:
    for options, message in (
        ({"num_input_frames": 5}, "num_input_frames is 5, but an image has 1 frame; give 1, or a"),
        ({"num_input_frames": 0}, "num_input_frames is 0, but there is an input; give 1 or 5"),
    ):
        with pytest.raises(worldline.InputError, match=message):
            world.stream(image, prompt=PROMPT, **options)


def test_notes_are_said_once(world: FlowWorld, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="worldline"):
        for _ in range(2):
            world.stream(prompt="x", fps=24, **SMALL)
    assert caplog.text.count("fps is 24; the released models move at 16") == 1


def test_options_of_other_families(
    tiny_predict2_5: Path, tiny_diffusion: Path, small_world: Path
) -> None:
    for options in (
        {"offload_diffusion_transformer": True},
        {"offload_text_encoder_model": True},
        {"offload_ar_model": True},
        {"disable_guardrail": True},
        {"disable_prompt_upsampler": True},
        {"offload_prompt_upsampler": True},
        {"generation": "1.0"},
        {"text_encoder_dtype": torch.float32},
    ):
        with pytest.raises(
            worldline.InputError, match=f"a Predict2.5 world, .* no {next(iter(options))}"
        ):
            load(tiny_predict2_5, **options)
    parts = {"disable_guardrail": True}
    for name, folder, more in (
        (TEXT2WORLD, tiny_diffusion, {"disable_prompt_upsampler": True}),
        (AUTOREGRESSIVE, small_world, {"disable_diffusion_decoder": True}),
    ):
        for options in (
            {"offload_diffusion_model": True},
            {"offload_text_encoder": True},
            {"disable_guardrails": True},
            {"schedule": "karras"},
        ):
            with pytest.raises(worldline.InputError, match=f"has no {next(iter(options))}"):
                worldline.load(name, folder, **parts, **more, **options)  # type: ignore[arg-type]


def test_the_commands_of_other_families(
    tiny_predict2_5: Path, tiny_diffusion: Path, small_world: Path
) -> None:
    root = tiny_predict2_5 / Path(POST.repository).name
    for find in (find_diffusion, find_autoregressive):
        for name in (root.name, root / POST.file):
            with pytest.raises(worldline.CheckpointError, match=r"use worldline predict2\.5"):
                find(name, tiny_predict2_5)
    for name, folder in ((TEXT2WORLD, tiny_diffusion), (AUTOREGRESSIVE, small_world)):
        with pytest.raises(worldline.CheckpointError, match=r"is no world of Predict2\.5; worldl"):
            find_predict2_5(name, folder)


def test_released_worlds_need_their_guardrails(tiny_predict2_5: Path) -> None:
    with pytest.raises(worldline.CheckpointError, match="disable_guardrails=True"):
        worldline.load(POST.name, tiny_predict2_5)
