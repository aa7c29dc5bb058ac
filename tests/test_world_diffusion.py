"""The Python interface on the tiny diffusion worlds."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline.video.read import read_image, read_video
from worldline.weights.write import save
from worldline.world import DiffusionWorld

from .conftest import MODEL as AUTOREGRESSIVE
from .conftest import moving
from .offloading import check_offloading
from .tiny_diffusion import CONTEXT_LENGTH, CONTEXT_WIDTH, TEXT2WORLD, VIDEO2WORLD

WITHOUT_PARTS = {"disable_guardrail": True, "disable_prompt_upsampler": True}
PROMPT = "a red ball rolls"


def load(folder: Path, name: str, **options: Any) -> DiffusionWorld:
    world = worldline.load(name, folder, **WITHOUT_PARTS, **options)
    assert isinstance(world, DiffusionWorld)
    return world


@pytest.fixture(scope="module")
def text2world(tiny_diffusion: Path) -> DiffusionWorld:
    return load(tiny_diffusion, TEXT2WORLD)


@pytest.fixture(scope="module")
def video2world(tiny_diffusion: Path) -> DiffusionWorld:
    return load(tiny_diffusion, VIDEO2WORLD)


def test_generate_and_save(text2world: DiffusionWorld, tmp_path: Path) -> None:
    video = text2world.generate(prompt=PROMPT, seed=3, fps=30, num_steps=2)
    assert isinstance(video, worldline.Video)
    assert video.frames.shape == (17, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert (video.fps, video.prompt) == (30, PROMPT)
    path = video.save(tmp_path / "new" / "out.mp4")
    assert len(read_video(path).frames) == 17
    assert path.with_suffix(".txt").read_bytes() == PROMPT.encode()
    report = json.loads(path.with_suffix(".json").read_text())
    assert report == video.report


def test_the_words_of_an_earlier_video_go(
    text2world: DiffusionWorld, small_world: Path, image: Path, tmp_path: Path
) -> None:
    first = text2world.generate(prompt=PROMPT, num_steps=1)
    words = first.save(tmp_path / "out.mp4").with_suffix(".txt")
    second = text2world.generate(prompt_embeddings=torch.zeros(3, CONTEXT_WIDTH), num_steps=1)
    other = tmp_path / "other.txt"
    other.write_text("another's")
    second.save(tmp_path / "out.mp4")
    assert not words.exists()
    assert other.exists()
    # a world that takes no prompt has no say in it
    parts = {"disable_guardrail": True, "disable_diffusion_decoder": True}
    worldline.load(AUTOREGRESSIVE, small_world, **parts).generate(image).save(
        tmp_path / "other.mp4"
    )
    assert other.exists()


def test_the_report_tells_all(video2world: DiffusionWorld, image: Path) -> None:
    report = video2world.generate(image, prompt=PROMPT, num_steps=3).report
    assert report["model"] == VIDEO2WORLD
    assert report["generation"] == "Predict1"
    assert report["sampler"] == "edm_euler"
    assert report["rotary_precision"] == "bfloat16"
    assert report["request"]["prompt"] == PROMPT
    assert report["request"]["num_input_frames"] == 1
    assert report["tokens"] == 18
    assert report["attention"]
    assert len(report["seconds_of_steps"]) == 3
    assert report["seconds_per_step"] > 0
    files = report["files"]
    assert files["input"]["path"] == str(image.resolve())
    assert files["prompt_embeddings"] is None
    assert {"transformer", "tokenizer", "text_encoder"} <= files.keys()
    stages = [stage["name"] for stage in report["run"]["stages"]]
    assert stages == ["read", "text", "encode", "denoise", "decode"]


def test_the_report_tells_which_prompts_are_cut(text2world: DiffusionWorld) -> None:
    letters = CONTEXT_LENGTH - 1  # behind them stands `</s>`
    for prompt, negative in ((0, 0), (0, 3), (1, 2)):  # letters beyond
        words = {"prompt": "a" * (letters + prompt), "negative_prompt": "b" * (letters + negative)}
        expected = {
            name: {"max_length": CONTEXT_LENGTH, "num_truncated_tokens": count}
            for name, count in (("prompt", prompt), ("negative_prompt", negative))
            if count
        }
        for _ in range(2):  # the second time their embeddings are in the cache
            report = text2world.generate(**words, num_steps=1).report
            assert report["prompt_truncation"] == expected
    embedding = torch.zeros(3, CONTEXT_WIDTH)
    given = text2world.generate(prompt_embeddings=embedding, guidance=0, num_steps=1)
    assert given.report["prompt_truncation"] == {}


def test_every_form_of_input(video2world: DiffusionWorld, clip: Path, image: Path) -> None:
    frames = read_video(clip).frames
    options = {"prompt": PROMPT, "num_input_frames": 9, "num_steps": 2}
    from_file = video2world.generate(str(clip), **options).frames
    for form in (clip, frames, torch.from_numpy(frames)):
        assert np.array_equal(video2world.generate(form, **options).frames, from_file)
    options["num_input_frames"] = 1
    picture = read_image(image).frames
    from_image = video2world.generate(image, **options).frames
    for form in (Image.fromarray(picture[0]), picture):
        assert np.array_equal(video2world.generate(form, **options).frames, from_image)
    # one frame is taken where nothing is said
    del options["num_input_frames"]
    assert video2world.generate(frames, **options).report["request"]["num_input_frames"] == 1


def test_stream(text2world: DiffusionWorld) -> None:
    steps = list(text2world.stream(prompt=PROMPT, preview_every=2))
    assert all(isinstance(step, worldline.Step) for step in steps)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "denoise", "decode", "done"]
    assert sum(step.preview is not None for step in steps) == 1
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].frames is steps[-1].video.frames  # type: ignore[union-attr]


def test_what_it_does(text2world: DiffusionWorld, video2world: DiffusionWorld) -> None:
    assert (text2world.text2world, text2world.video2world) == (True, False)
    assert (video2world.text2world, video2world.video2world) == (False, True)
    assert text2world.parameters == sum(
        p.numel() for p in text2world.parts.transformer.module.parameters()
    )


def test_embeddings_in_place_of_a_prompt(text2world: DiffusionWorld, tmp_path: Path) -> None:
    words = torch.randn(5, CONTEXT_WIDTH)
    save({"prompt": words, "negative_prompt": -words}, tmp_path / "words.safetensors")
    video = text2world.generate(prompt_embeddings=tmp_path / "words.safetensors")
    assert video.prompt is None
    stamp = video.report["files"]["prompt_embeddings"]
    assert stamp["path"] == str(tmp_path / "words.safetensors")
    same = text2world.generate(prompt_embeddings=words, negative_prompt_embeddings=-words)
    assert np.array_equal(same.frames, video.frames)
    assert same.report["files"]["prompt_embeddings"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no prompt; give one, or prompt_embeddings"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "steps": 3}, "unknown option steps; there are: input_type, prompt, "),
        ({"prompt": "x", "num_input_frames": 1}, "num_input_frames is 1, but there is no input"),
        ({"prompt": "x", "height": 33}, "height is 33"),
        ({"prompt": "x", "input_type": "foo"}, "input_type is 'foo'"),
        ({"prompt_embeddings": torch.ones(3, 3)}, r"it must be floating and finite, \(S, 24\)"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, text2world: DiffusionWorld) -> None:
    with pytest.raises(worldline.InputError, match=message):
        text2world.stream(**options)


def test_wrong_inputs(
    text2world: DiffusionWorld, video2world: DiffusionWorld, image: Path, short_clip: Path
) -> None:
    for world, given, options, message in (
        (text2world, image, {}, "is a Text2World model, which continues no input"),
        (video2world, None, {}, "is a Video2World model, which needs an image or a video"),
        (video2world, image, {"num_input_frames": 9}, "is 9, but an image has 1 frame"),
        (video2world, image, {"num_input_frames": 0}, "is 0, but there is an input"),
        (video2world, short_clip, {"num_input_frames": 9}, "has 5 frames, but num_input_frames"),
        (video2world, image, {"input_type": "video"}, "is an image, but the input type is video"),
        (video2world, "absent.mp4", {}, "absent.mp4"),
        (video2world, moving(1)[0], {}, r"frames must be uint8 \(T, H, W, 3\)"),
        (video2world, [], {}, "the input is a list"),
    ):
        with pytest.raises(worldline.InputError, match=message):
            world.stream(given, prompt=PROMPT, **options)  # type: ignore[arg-type]


def test_notes_are_said_once(text2world: DiffusionWorld, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="worldline"):
        for _ in range(2):
            text2world.stream(prompt="x", fps=50)
    assert caplog.text.count("fps is 50; the released models know 12 to 40") == 1


def test_options_of_the_other_family(small_world: Path, tiny_diffusion: Path) -> None:
    other = {"disable_guardrail": True, "disable_diffusion_decoder": True}
    for options, name in (
        ({"offload_diffusion_transformer": True}, "offload_diffusion_transformer"),
        ({"offload_text_encoder_model": True}, "offload_text_encoder_model"),
        ({"text_encoder_dtype": torch.float32}, "text_encoder_dtype"),
        ({"tokenizer_dir": "x"}, "tokenizer_dir"),
        ({"generation": "1.0"}, "generation"),
        ({"disable_prompt_upsampler": True}, "disable_prompt_upsampler"),
        ({"video": (33, 32, 48)}, "video"),
    ):
        with pytest.raises(
            worldline.InputError, match=f"an autoregressive (base )?world, .* no {name}"
        ):
            worldline.load(AUTOREGRESSIVE, small_world, **other, **options)  # type: ignore[arg-type]
    for options, name in (
        ({"offload_ar_model": True}, "offload_ar_model"),
        ({"disable_diffusion_decoder": True}, "disable_diffusion_decoder"),
    ):
        with pytest.raises(worldline.InputError, match=f"a diffusion world, which has no {name}"):
            worldline.load(TEXT2WORLD, tiny_diffusion, **WITHOUT_PARTS, **options)  # type: ignore[arg-type]


def test_released_parts_that_are_missing_are_named(tiny_diffusion: Path) -> None:
    told = "disable_guardrail=True.*disable_prompt_upsampler=True"
    with pytest.raises(worldline.CheckpointError, match=told):
        worldline.load(TEXT2WORLD, tiny_diffusion)


def test_dtypes_of_the_text_encoder(tiny_diffusion: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        world = load(tiny_diffusion, TEXT2WORLD, text_encoder_dtype=dtype)
        assert world.generate(prompt=PROMPT, num_steps=1).report["text_encoder_dtype"] == "bfloat16"
    for wrong in ("float16", torch.float16, "half", "nn"):
        with pytest.raises(worldline.InputError, match=r"text_encoder_dtype is .* torch\.bfloat16"):
            load(tiny_diffusion, TEXT2WORLD, text_encoder_dtype=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tiny_diffusion: Path, clip: Path) -> None:
    world = load(tiny_diffusion, VIDEO2WORLD, dtype=dtype)
    video = world.generate(clip, prompt=PROMPT, num_steps=2, preview_every=1)
    assert video.report["dtype"] == str(dtype).removeprefix("torch.")
    assert video.report["text_encoder_dtype"] == "bfloat16"


OFFLOADED = {
    "offload_text_encoder_model": "T5Encoder",
    "offload_tokenizer": "CosmosTokenizer",
    "offload_diffusion_transformer": "DiT",
}


@pytest.mark.parametrize("flags", [tuple(OFFLOADED), *((flag,) for flag in OFFLOADED)])
def test_what_is_offloaded_is_there_while_it_is_used(
    flags: tuple[str, ...], tiny_diffusion: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"prompt": PROMPT, "num_input_frames": 9, "preview_every": 2}
    used = ("T5Encoder", "CosmosTokenizer", "DiT", "CosmosTokenizer")
    make = partial(load, tiny_diffusion, VIDEO2WORLD)
    check_offloading(make, clip, options, OFFLOADED, used, flags, monkeypatch)


@pytest.mark.gpu
def test_offloading_on_a_gpu(tiny_diffusion: Path, clip: Path) -> None:
    videos = []
    for given in (False, True):
        flags = dict.fromkeys(OFFLOADED, given)
        world = load(tiny_diffusion, VIDEO2WORLD, dtype=torch.float32, **flags)
        videos.append(world.generate(clip, prompt="never asked before", num_input_frames=9))
        assert set(videos[-1].report["offload"].values()) == {given}
    assert np.array_equal(videos[0].frames, videos[1].frames)
