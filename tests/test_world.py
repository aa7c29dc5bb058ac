"""The Python interface of the README, on tiny worlds of every family."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline import memory
from worldline.families.autoregressive import family
from worldline.inputs import read_clip
from worldline.locate import bundled_names
from worldline.memory import Memory
from worldline.parallel.offload import Offloadable
from worldline.video.read import read_image, read_video
from worldline.video.write import write_video
from worldline.weights.checkpoint import save

from . import tiny_decoder, tiny_diffusion, tiny_predict2_5
from .adapters import write_peft
from .conftest import MODEL, moving
from .offloading import check_offloading

PROMPT = "a red ball rolls"
GUIDED = ["text", "encode", "denoise", "decode"]
PLAIN = {"disable_guardrail": True, "disable_diffusion_decoder": True}


@dataclass(frozen=True)
class Kind:
    """A world to test.

    Attributes:
        name: of the model.
        root: fixture of its checkpoint folder.
        load: load options.
        options: of a small request.
        frames: of its video.
        fps: of its video.
        stages: of a request with an input, after it was read.
        width: of a text embedding; 0 where it takes no prompt.
        length: most rows of one.
        networks: offload flag -> network.
        used: networks in the order of their use.
    """

    name: str
    root: str
    load: dict[str, Any]
    options: dict[str, Any]
    frames: int
    fps: float
    stages: list[str]
    width: int
    length: int
    networks: dict[str, str]
    used: tuple[str, ...]


KINDS = {
    "base": Kind(
        name=MODEL,
        root="small_world",
        load=PLAIN,
        options={},
        frames=33,
        fps=25,
        stages=["encode", "prefill", "tokens", "decode"],
        width=0,
        length=0,
        networks={"offload_tokenizer": "CosmosTokenizer", "offload_ar_model": "ARTransformer"},
        used=("CosmosTokenizer", "ARTransformer", "CosmosTokenizer"),
    ),
    "prompted": Kind(
        name=tiny_decoder.VIDEO2WORLD,
        root="whole_world",
        load={"disable_guardrail": True},
        options={"prompt": PROMPT},
        frames=33,
        fps=25,
        stages=["text", "encode", "prefill", "tokens", "denoise", "decode"],
        width=tiny_decoder.CONTEXT_WIDTH,
        length=tiny_decoder.CONTEXT_LENGTH,
        networks={
            "offload_text_encoder_model": "T5Encoder",
            "offload_tokenizer": "CosmosTokenizer",
            "offload_diffusion_decoder": "DiT",
            "offload_ar_model": "ARTransformer",
        },
        used=("T5Encoder", "CosmosTokenizer", "ARTransformer", "DiT", "CosmosTokenizer"),
    ),
    "diffusion": Kind(
        name=tiny_diffusion.VIDEO2WORLD,
        root="tiny_diffusion",
        load={"disable_guardrail": True, "disable_prompt_upsampler": True},
        options={"prompt": PROMPT, "num_steps": 2, "preview_every": 2},
        frames=17,
        fps=24,
        stages=GUIDED,
        width=tiny_diffusion.CONTEXT_WIDTH,
        length=tiny_diffusion.CONTEXT_LENGTH,
        networks={
            "offload_text_encoder_model": "T5Encoder",
            "offload_tokenizer": "CosmosTokenizer",
            "offload_diffusion_transformer": "DiT",
        },
        used=("T5Encoder", "CosmosTokenizer", "DiT", "CosmosTokenizer"),
    ),
    "predict2.5": Kind(
        name=tiny_predict2_5.POST.name,
        root="tiny_predict2_5",
        load={"disable_guardrails": True, "num_video_frames": 9, "height": 32, "width": 48},
        options={"prompt": PROMPT, **tiny_predict2_5.SMALL, "preview_every": 2},
        frames=9,
        fps=16,
        stages=GUIDED,
        width=tiny_predict2_5.CONFIG.feature_width,
        length=tiny_predict2_5.TEXT_LENGTH,
        networks={
            "offload_text_encoder": "Reason1Encoder",
            "offload_tokenizer": "WanTokenizer",
            "offload_diffusion_model": "FlowDiT",
        },
        used=("Reason1Encoder", "WanTokenizer", "FlowDiT", "WanTokenizer"),
    ),
}
PROMPTED = [kind for kind in KINDS if KINDS[kind].width]
GUIDING = ["diffusion", "predict2.5"]


@pytest.fixture(scope="session")
def load(
    small_world: Path, whole_world: Path, tiny_diffusion: Path, tiny_predict2_5: Path
) -> Callable[..., worldline.World]:
    """Loads a world by its kind, or another one beside it."""
    roots = {
        "small_world": small_world,
        "whole_world": whole_world,
        "tiny_diffusion": tiny_diffusion,
        "tiny_predict2_5": tiny_predict2_5,
    }

    def load(kind: str, name: str = "", **options: Any) -> worldline.World:
        one = KINDS[kind]
        root = roots[one.root]
        return worldline.load(name or one.name, checkpoint_dir=root, **{**one.load, **options})

    return load


@pytest.fixture(scope="session")
def worlds(load: Callable[..., worldline.World]) -> dict[str, worldline.World]:
    return {kind: load(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def text2world(load: Callable[..., worldline.World]) -> worldline.World:
    return load("diffusion", tiny_diffusion.TEXT2WORLD)


@pytest.fixture
def plain(worlds: dict[str, worldline.World]) -> worldline.World:
    return worlds["base"]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_save(
    kind: str, worlds: dict[str, worldline.World], clip: Path, tmp_path: Path
) -> None:
    world, expected = worlds[kind], KINDS[kind]
    video = world.generate(clip, seed=1, **expected.options)
    assert isinstance(video, worldline.Video)
    assert (video.frames.shape, video.frames.dtype) == ((expected.frames, 32, 48, 3), np.uint8)
    assert (video.fps, video.prompt) == (expected.fps, expected.options.get("prompt"))
    path = video.save(tmp_path / "new" / "out.mp4")
    assert len(read_video(path).frames) == expected.frames
    assert json.loads(path.with_suffix(".json").read_text()) == video.report
    assert path.with_suffix(".txt").exists() == (video.prompt is not None)
    assert np.array_equal(world.generate(clip, seed=1, **expected.options).frames, video.frames)
    assert not np.array_equal(world.generate(clip, seed=2, **expected.options).frames, video.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report(kind: str, worlds: dict[str, worldline.World], clip: Path) -> None:
    world, expected = worlds[kind], KINDS[kind]
    report = world.generate(clip, **expected.options).report
    assert report["model"] == expected.name
    assert report["parameters"] == world.parameters
    assert report["input"] == str(clip)
    assert report["request"]["seed"] == world.opened.family.request.model_fields["seed"].default
    assert report["attention"]
    assert report["tokens"] > 0
    assert (report["dtype"], report["text_encoder_dtype"]) == (
        "float32",
        "float32" if expected.width else None,
    )
    flags = {flag.removeprefix("offload_"): False for flag in expected.networks}
    assert report["offload"] == flags
    files = {Path(file["path"]) for file in report["files"]}
    assert {file.resolve() for part in world.opened.parts.values() for file in part.files} <= files
    assert clip.resolve() in files
    assert [stage["name"] for stage in report["run"]["stages"]] == ["read", *expected.stages]
    assert {stage["name"] for stage in report["load"]["stages"]} == {"load"}


def test_reports_of_the_families(worlds: dict[str, worldline.World], clip: Path) -> None:
    for kind, entries in (
        ("base", {"tokens": 18, "clips_at_once": 1, "diffusion_decoder": None}),
        ("diffusion", {"tokens": 18, "generation": "Predict1"}),
        ("predict2.5", {"tokens": 18, "schedule": "karras", "known_timestep": 0.1, "chunks": 1}),
    ):
        report = worlds[kind].generate(clip, **KINDS[kind].options).report
        assert {name: report[name] for name in entries} == entries
        steps = {"base": 0, "diffusion": 2, "predict2.5": 3}[kind]
        assert len(report["seconds_of_steps"]) == steps
        assert (report["seconds_per_step"] or 0) > 0 or not steps


@pytest.mark.parametrize("kind", GUIDING)
def test_prompts_that_are_cut_are_reported(kind: str, worlds: dict[str, worldline.World]) -> None:
    world, expected = worlds[kind], KINDS[kind]
    if kind == "diffusion":
        options, letters = {**expected.options, "preview_every": 0}, expected.length - 1  # `</s>`
    else:
        text = world.parts.text
        assert text is not None
        tokens = len(text.files.tokenizer.encode("a" * expected.length))  # the chat's, too
        letters = 2 * expected.length - tokens
        options = {**expected.options, "preview_every": 0}
    picture = moving(1) if kind == "diffusion" else None
    del options["prompt"]
    for prompt, negative in ((0, 0), (0, 3), (1, 2)):  # letters beyond
        words = {"prompt": "a" * (letters + prompt), "negative_prompt": "b" * (letters + negative)}
        cut = {
            name: {"max_length": expected.length, "num_truncated_tokens": count}
            for name, count in (("prompt", prompt), ("negative_prompt", negative))
            if count
        }
        for _ in range(2):  # the second time their embeddings are in the cache
            report = world.generate(picture, **words, **options).report
            assert report["prompt_truncation"] == cut
    unread = world.generate(picture, **words, **{**options, "guidance": 0}).report
    assert unread["prompt_truncation"].keys() == {"prompt"}


@pytest.mark.parametrize("kind", ["base", *GUIDING])
def test_every_form_of_input(
    kind: str, worlds: dict[str, worldline.World], clip: Path, image: Path
) -> None:
    world, options = worlds[kind], KINDS[kind].options
    frames = read_video(clip).frames
    from_file = world.generate(str(clip), **options).frames
    for form in (clip, frames, torch.from_numpy(frames)):
        assert np.array_equal(world.generate(form, **options).frames, from_file)
    picture = read_image(image).frames
    from_image = world.generate(image, **options).frames
    same = world.generate(Image.fromarray(picture[0]), **options)
    assert np.array_equal(same.frames, from_image)
    one = world.generate(picture, num_input_frames=1, **options)
    assert np.array_equal(one.frames, from_image)


@pytest.mark.parametrize("kind", KINDS)
def test_stream(kind: str, worlds: dict[str, worldline.World], clip: Path) -> None:
    options = KINDS[kind].options
    steps = list(worlds[kind].stream(clip, **options))
    assert all(isinstance(step, worldline.Step) for step in steps)
    kinds = [name for name in KINDS[kind].stages if name != "prefill"]
    if kind == "base":
        kinds.remove("decode")  # frames come beside the tokens
    assert list(dict.fromkeys(step.kind for step in steps)) == [*kinds, "done"]
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].video is not None
    assert steps[-1].frames is steps[-1].video.frames
    pieces = [step.frames for step in steps[:-1] if step.frames is not None]
    assert np.array_equal(np.concatenate(pieces), steps[-1].video.frames)
    assert any(step.preview is not None for step in steps) == ("preview_every" in options)


def test_frames_come_as_latent_frames_complete(plain: worldline.World, clip: Path) -> None:
    steps = list(plain.stream(clip, num_video_frames=49))
    counts = [(step.done, len(step.frames)) for step in steps[:-1] if step.frames is not None]
    # 6 tokens a latent frame; the first to be complete brings the given ones along
    assert counts == [(6, 17), (12, 8), (18, 8), (24, 8), (30, 8)]


@pytest.mark.parametrize("rollout", ["tokens", "pixels"])
@pytest.mark.parametrize("clips", [1, 2])
def test_frames_are_held_once(rollout: str, clips: int, plain: worldline.World, clip: Path) -> None:
    """Pieces lie in the video that is made of them."""
    each = [{"seed": number} for number in range(clips)]
    pieces: dict[int, list[Any]] = {number: [] for number in range(clips)}
    options = {"num_video_frames": 57, "rollout": rollout}
    for number, step in plain.stream_batch([clip] * clips, each, **options):
        if step.video is not None:
            assert sum(map(len, pieces[number])) == 57
            assert all(np.shares_memory(piece, step.video.frames) for piece in pieces[number])
        elif step.frames is not None:
            pieces[number].append(step.frames)


def test_batches_of_a_family_that_makes_one_after_another(
    worlds: dict[str, worldline.World], clip: Path
) -> None:
    world, options = worlds["predict2.5"], {**KINDS["predict2.5"].options, "guidance": 0}
    steps = world.stream_batch([clip, clip], [{"seed": 1}, {"seed": 2}], **options)
    videos = {index: step.video for index, step in steps if step.video is not None}
    for index, seed in enumerate((1, 2)):
        alone = world.generate(clip, **options, seed=seed)
        assert np.array_equal(videos[index].frames, alone.frames)


def test_a_stream_may_be_closed(plain: worldline.World, clip: Path) -> None:
    whole = plain.generate(clip).frames
    steps = plain.stream(clip)
    assert any(step.kind == "tokens" for step in steps)
    del steps
    assert np.array_equal(plain.generate(clip).frames, whole)


def test_only_the_last_frames_count(plain: worldline.World) -> None:
    frames = moving(20)
    changed = frames.copy()
    changed[:11] = 0
    assert np.array_equal(plain.generate(frames).frames, plain.generate(changed).frames)


@pytest.mark.parametrize("kind", PROMPTED)
def test_embeddings_in_place_of_a_prompt(
    kind: str, worlds: dict[str, worldline.World], clip: Path, tmp_path: Path
) -> None:
    world, width = worlds[kind], KINDS[kind].width
    options = {name: value for name, value in KINDS[kind].options.items() if name != "prompt"}
    words, path = torch.randn(5, width), tmp_path / "words.safetensors"
    save({"prompt": words, "negative_prompt": -words}, path)
    video = world.generate(clip, prompt_embeddings=path, **options)
    assert video.prompt is None
    assert str(path) in {file["path"] for file in video.report["files"]}
    given = {"prompt_embeddings": words}
    if kind in GUIDING:
        given["negative_prompt_embeddings"] = -words
    same = world.generate(clip, **given, **options)
    assert np.array_equal(same.frames, video.frames)
    assert str(path) not in {file["path"] for file in same.report["files"]}
    assert same.report["fingerprint"] != video.report["fingerprint"]
    # one that holds what a prompt gives is the prompt
    assert world.parts.text is not None
    with_prompt = world.generate(clip, prompt=PROMPT, **options)
    given["prompt_embeddings"] = world.parts.text.embed([PROMPT])[PROMPT]
    given.pop("negative_prompt_embeddings", None)
    assert np.array_equal(world.generate(clip, **given, **options).frames, with_prompt.frames)
    with pytest.raises(worldline.InputError, match=f"floating and finite, .*{width}"):
        world.generate(clip, prompt_embeddings=words / 0, **options)


def test_a_negative_prompt_is_not_dropped_in_silence(
    worlds: dict[str, worldline.World],
    clip: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = torch.randn(5, KINDS["prompted"].width)
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    save({"prompt": prompt, "negative_prompt": torch.randn(5, KINDS["prompted"].width)}, both)
    save({"prompt": prompt}, alone)
    first = worlds["prompted"].generate(clip, prompt_embeddings=alone)
    caplog.set_level("INFO")
    for _ in range(2):  # it is logged once
        second = worlds["prompted"].generate(clip, prompt_embeddings=both)
        [message] = [message for message in caplog.messages if "no effect" in message]
        assert str(both) in message
        assert "negative_prompt" in message
    assert np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("base", {"temperature": -1}, "temperature is -1"),
        ("base", {"num_frames": 5, "num_input_frames": 1.5}, "num_frames: no such option"),
        ("base", {"input_type": "image"}, "is of type video"),
        ("base", {"input_type": "foo"}, "input_type is 'foo'"),
        ("base", {"prompt": "x"}, f"{MODEL} is a base model, which takes no prompt"),
        ("base", {"prompt_embeddings": torch.zeros(1, 3)}, "which takes no prompt"),
        ("prompted", {}, "is a Video2World model, which needs a prompt"),
        ("prompted", {"prompt": " \n"}, "prompt: it is empty"),
        ("prompted", {"prompt": "x", "negative_prompt": "y"}, "negative_prompt: no such option"),
        ("prompted", {"prompt_embeddings": 5}, "prompt_embeddings is a int"),
        ("prompted", {"prompt_embeddings": "nowhere"}, "nowhere"),
        ("diffusion", {}, "no prompt; give prompt or prompt_embeddings"),
        ("diffusion", {"prompt": "x", "height": 33}, "height is 33"),
        ("diffusion", {"prompt": "x", "steps": 3}, "steps: no such option; did you mean num_st"),
        ("predict2.5", {}, "no prompt; give prompt or prompt_embeddings"),
        ("predict2.5", {"prompt": "x", "num_video_frames": 10}, "num_video_frames is 10"),
        ("predict2.5", {"prompt_embeddings": torch.ones(3, 3)}, r"is float32 \(3, 3\)"),
    ],
)
def test_wrong_options(
    kind: str,
    options: dict[str, Any],
    message: str,
    worlds: dict[str, worldline.World],
    clip: Path,
) -> None:
    """Found before anything is made."""
    with pytest.raises(worldline.InputError, match=message):
        worlds[kind].stream(clip, **options)


@pytest.mark.parametrize(
    ("kind", "wrong", "options", "message"),
    [
        ("base", moving(3), {}, "it has 3 frames, num_input_frames is 9"),
        ("base", moving(9).astype(np.float32), {}, r"uint8 \(T, H, W, 3\)"),
        ("base", moving(9)[..., :2], {}, r"uint8 \(T, H, W, 3\)"),
        ("base", moving(1)[0], {}, r"uint8 \(T, H, W, 3\)"),
        ("base", moving(9)[:, :0], {}, r"uint8 \(T, H, W, 3\)"),
        ("base", moving(9)[:0], {}, r"uint8 \(T, H, W, 3\)"),
        ("base", torch.zeros(9, 4, 4, 3), {}, r"uint8 \(T, H, W, 3\)"),
        ("base", [], {}, "the input is list"),
        ("base", b"in.mp4", {}, "the input is bytes"),
        ("base", 3, {"input_type": "video"}, "the input is int"),
        ("base", None, {}, "no input; give an image or a video"),
        ("base", Image.new("RGB", (4, 4)), {"input_type": "video"}, "image 4 x 4.* type image"),
        ("base", Image.new("RGB", (0, 4)), {}, "image 0 x 4"),
        ("base", "in\0.mp4", {}, "name of a file"),
        ("base", "absent.mp4", {}, r"absent\.mp4"),
        ("diffusion", None, {}, "is a Video2World model; give an image or a video"),
        ("diffusion", moving(5), {"num_input_frames": 9}, "has 5 frames, num_input_frames is 9"),
        ("diffusion", moving(1), {"num_input_frames": 0}, "num_input_frames is 0, but there is"),
        ("predict2.5", None, {"num_input_frames": 1}, "is 1, but there is no input"),
    ],
)
def test_wrong_inputs(
    kind: str,
    wrong: Any,
    options: dict[str, Any],
    message: str,
    worlds: dict[str, worldline.World],
) -> None:
    with pytest.raises(worldline.InputError, match=message):
        worlds[kind].stream(wrong, **{**KINDS[kind].options, **options})


@pytest.mark.parametrize("kind", GUIDING)
def test_frames_of_an_image(kind: str, worlds: dict[str, worldline.World], image: Path) -> None:
    for frames, message in ((9, "is 9, but an image has 1 frame"), (0, "is 0, but there is an in")):
        with pytest.raises(worldline.InputError, match=message):
            worlds[kind].stream(image, **KINDS[kind].options, num_input_frames=frames)


def test_text2world_takes_no_input(text2world: worldline.World, image: Path) -> None:
    with pytest.raises(worldline.InputError, match="Text2World model without inputs"):
        text2world.stream(image, prompt=PROMPT)
    video = text2world.generate(prompt=PROMPT, fps=30, num_steps=2)
    assert (video.frames.shape, video.fps) == ((17, 32, 48, 3), 30)


def test_a_grid_without_a_frame_to_make(own_world: Path, clip: Path, image: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [2, 2, 3]}))
    short = worldline.load(MODEL, checkpoint_dir=own_world, **PLAIN)
    with pytest.raises(worldline.InputError, match=r"is 9, the model makes 9 frames; give 1"):
        short.stream(clip)
    assert len(short.generate(image).frames) == 9


def test_notes_are_logged_once(
    worlds: dict[str, worldline.World], caplog: pytest.LogCaptureFixture
) -> None:
    options = {**KINDS["predict2.5"].options, "fps": 24}
    with caplog.at_level(logging.INFO, logger="worldline"):
        for _ in range(2):
            worlds["predict2.5"].stream(**options)
    assert caplog.text.count("fps is 24; ") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_another_aspect(
    kind: str,
    worlds: dict[str, worldline.World],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line is logged, and stands in the report; `fit` decides, and is part of what resumes."""
    world, options = worlds[kind], KINDS[kind].options
    path, thin = tmp_path / "portrait.bin", tmp_path / "thin.bin"
    Image.fromarray(moving(1, 60, 24)[0]).save(path, format="BMP")
    Image.fromarray(moving(1, 1600, 2)[0]).save(thin, format="TIFF")
    default = "stretch" if kind == "diffusion" else "crop"
    jobs = {}
    for fit, word in (("stretch", "stretched"), ("crop", "cropped"), ("pad", "padded")):
        with caplog.at_level(logging.INFO, logger="worldline"):
            caplog.clear()
            jobs[fit] = world.prepare(path, {**options, "fit": fit})
        assert f"{path}: 24 x 60 pixels are {word} " in caplog.text
        assert caplog.text.count(str(path)) == 1
        assert len(jobs[fit].source["input_changes"]) == 1
    fingerprints = {fit: job.source["fingerprint"] for fit, job in jobs.items()}
    assert len(set(fingerprints.values())) == 3
    assert world.prepare(path, options).source["fingerprint"] == fingerprints[default]
    video = world.generate(path, fit="pad", **options)
    assert video.report["request"]["fit"] == "pad"
    assert video.report["input_changes"] == jobs["pad"].source["input_changes"]
    assert world.prepare(thin, {**options, "fit": "stretch"}).clip is not None
    with pytest.raises(worldline.InputError, match="2 x 1600 pixels"):
        world.prepare(thin, {**options, "fit": "crop"})
    shape = world.opened.family.video(world.opened, jobs["pad"].request)
    fitting = moving(9, 2 * shape.height, 2 * shape.width)
    assert not world.prepare(fitting, options).source["input_changes"]


def test_a_clip_of_another_speed(plain: worldline.World, tmp_path: Path) -> None:
    for fps, words in ((25, []), (60, ["60"]), (10, ["10"])):
        write_video(moving(12, 32, 48), tmp_path / "a.mkv", fps)
        notes = plain.prepare(tmp_path / "a.mkv", {}).source["input_changes"]
        assert [word for note, word in zip(notes, words, strict=True) if word in note] == words
        # one frame has no speed
        assert not plain.prepare(tmp_path / "a.mkv", {"num_input_frames": 1}).source[
            "input_changes"
        ]


def test_a_long_video(worlds: dict[str, worldline.World]) -> None:
    options = {**KINDS["predict2.5"].options, "num_video_frames": 20, "chunk_size": 13}
    video = worlds["predict2.5"].generate(**options)
    assert len(video.frames) == 20
    assert video.report["chunks"] == 2
    assert video.report["tokens"] == 24 * 2 * 3  # of what is denoised at once


def test_one_frame_is_saved_as_a_picture(
    worlds: dict[str, worldline.World], tmp_path: Path
) -> None:
    options = KINDS["predict2.5"].options
    picture = worlds["predict2.5"].generate(**{**options, "num_video_frames": 1})
    assert read_image(picture.save(tmp_path / "out.jpg")).frames.shape == (1, 32, 48, 3)
    with pytest.raises(worldline.InputError, match="has 1 frame"):
        worlds["predict2.5"].generate(**options).save(tmp_path / "more.jpg")


def test_words_of_an_earlier_video_go(
    text2world: worldline.World, plain: worldline.World, image: Path, tmp_path: Path
) -> None:
    words = text2world.generate(prompt=PROMPT, num_steps=1).save(tmp_path / "out.mp4")
    words = words.with_suffix(".txt")
    assert words.read_text() == PROMPT
    embedded = text2world.generate(
        prompt_embeddings=torch.zeros(3, tiny_diffusion.CONTEXT_WIDTH), num_steps=1
    )
    embedded.save(tmp_path / "out.mp4")
    assert not words.exists()
    # another's file is kept where no video had a prompt
    other = tmp_path / "other.txt"
    other.write_text("another's")
    for _ in range(2):
        plain.generate(image).save(tmp_path / "other.mp4")
    embedded.save(tmp_path / "other.mp4")
    assert other.exists()


@pytest.mark.parametrize(
    ("kind", "single"), [(kind, True) for kind in KINDS] + [(kind, False) for kind in KINDS]
)
def test_offloaded_parts_are_there_while_they_are_used(
    kind: str,
    single: bool,
    load: Callable[..., worldline.World],
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them, or the transformer alone."""
    expected = KINDS[kind]
    options, used = expected.options, expected.used
    if kind == "predict2.5":  # two chunks
        options = {**options, "num_video_frames": 20, "chunk_size": 13}
        used = (used[0], *(2 * used[1:]))
    flags = [*expected.networks][-1:] if single else [*expected.networks]
    check_offloading(
        partial(load, kind), clip, options, expected.networks, used, flags, monkeypatch
    )


@pytest.mark.parametrize("kind", GUIDING)
def test_adapters_are_merged_into_what_is_streamed(
    kind: str,
    load: Callable[..., worldline.World],
    worlds: dict[str, worldline.World],
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = KINDS[kind]
    adapter = write_peft(kind, worlds[kind].opened.folder, tmp_path / "adapter", 5)
    adapted = partial(load, kind, lora=adapter)
    without = worlds[kind].generate(clip, **expected.options).frames
    assert not np.array_equal(adapted().generate(clip, **expected.options).frames, without)
    flags = [*expected.networks]
    check_offloading(
        adapted, clip, expected.options, expected.networks, expected.used, flags, monkeypatch
    )


@pytest.mark.gpu
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_on_a_gpu(
    kind: str,
    room: bool,
    load: Callable[..., worldline.World],
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Offloadable, "_has_room", lambda part: room)
    videos, options = [], dict(KINDS[kind].options)
    if "prompt" in options:
        options["prompt"] = "never used before"
    for offload in (False, True):
        flags = dict.fromkeys(KINDS[kind].networks, offload)
        world = load(kind, dtype=torch.float32, **flags)
        videos.append(world.generate(clip, **options))
        assert set(videos[-1].report["offload"].values()) == {offload}
    assert np.array_equal(videos[0].frames, videos[1].frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
@pytest.mark.parametrize("kind", GUIDING)
def test_other_dtypes(
    kind: str, dtype: Any, load: Callable[..., worldline.World], clip: Path
) -> None:
    report = load(kind, dtype=dtype).generate(clip, **KINDS[kind].options).report
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["text_encoder_dtype"] == "bfloat16"


def test_a_dtype_of_the_text_encoder(load: Callable[..., worldline.World], clip: Path) -> None:
    world = load("diffusion", text_encoder_dtype=torch.bfloat16)
    report = world.generate(clip, **KINDS["diffusion"].options).report
    assert (report["dtype"], report["text_encoder_dtype"]) == ("float32", "bfloat16")


def test_frames_without_room(
    worlds: dict[str, worldline.World],
    load: Callable[..., worldline.World],
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before anything is made, of one clip and of batched clips."""
    plain, batch = load("base", batch_size=2), ([clip, clip], [{}, {}])
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(10**9, 2 * 10**9))
    large, half = {"num_video_frames": 250_001}, {"num_video_frames": 125_001}
    message = r"num_video_frames is 250001: .* 1 video.* 32 x 48 pixels need 1\.2 GB of host"
    with pytest.raises(worldline.InsufficientMemoryError, match=message):
        plain.stream(clip, **large)
    with pytest.raises(worldline.InsufficientMemoryError, match=message):
        plain.stream_batch(*batch, **large)
    plain.stream_batch(*batch, **half)  # one video is decoded after another
    with pytest.raises(worldline.InsufficientMemoryError, match=r"2 video.* 1\.2 GB"):
        plain.stream_batch(*batch, **half, rollout="pixels")
    long = {**KINDS["predict2.5"].options, "num_video_frames": 250_000, "chunk_size": 13}
    with pytest.raises(worldline.InsufficientMemoryError, match="num_video_frames is 250000"):
        worlds["predict2.5"].stream(**long)
    monkeypatch.setattr("worldline.guards.release_of", lambda _: "Predict1")
    with pytest.raises(worldline.InsufficientMemoryError, match=r"1\.2 GB"):
        plain.stream(clip, **half)


def test_an_automatic_batch_is_planned(
    load: Callable[..., worldline.World], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as kernels take, where some run; no more are drawn in step than there is room for."""
    assert load("base").parts.compute.batch_size == 1
    compiled: list[int] = []

    def prepare(_: Any, compute: Any) -> Any:
        compiled.append(compute.batch_size)
        return nullcontext()

    most = replace(family.FAMILY, max_batch_size=lambda *_: 2, prepare=prepare)
    monkeypatch.setattr(family, "FAMILY", most)
    world = load("base")
    assert world.parts.compute.batch_size == 2
    assert compiled == [1]  # a batch may never come
    steps = world.stream_batch([clip] * 3, [{}] * 3)
    reports = [step.video.report for _, step in steps if step.video is not None]
    assert [report["clips_at_once"] for report in reports] == [2, 2, 1]


def test_room_for_a_batch_and_for_a_size(load: Callable[..., worldline.World], clip: Path) -> None:
    """Clips are drawn two at a time, as the plan was made for; a wrong size is named."""
    world = load("base", batch_size=2)
    assert world.parts.compute.batch_size == 2
    steps = world.stream_batch([clip] * 3, [{}] * 3)
    reports = [step.video.report for _, step in steps if step.video is not None]
    assert [report["clips_at_once"] for report in reports] == [2, 2, 1]
    for kind, options, part in (
        ("base", {"height": 32}, "height: no such option"),
        ("diffusion", {"num_video_frames": 16}, "16 frames"),
        ("predict2.5", {"height": 33}, "33 x 48"),
    ):
        with pytest.raises(worldline.InputError, match=part):
            load(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_debug_logs_a_line_a_stage(
    kind: str, worlds: dict[str, worldline.World], clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "worldline.report"):
        video = worlds[kind].generate(clip, **KINDS[kind].options)
    messages = (record.getMessage() for record in caplog.records)
    logged = [message for message in messages if "mean" in message]
    stages = {line.partition(":")[0] for line in logged}
    assert stages == {*KINDS[kind].stages} - {"prefill"}
    assert any(f"decode: {video.frames.shape} uint8, mean" in line for line in logged)


def test_a_world_without_room_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(1, 10**9))
    for name in bundled_names():
        message = f"^{re.escape(name)} needs about"
        with pytest.raises(worldline.InsufficientMemoryError, match=message):
            worldline.load(name)


def test_missing_parts_of_released_models(
    small_world: Path, tiny_diffusion: Path, tiny_predict2_5: Path
) -> None:
    """Each names the option to run without, all at once."""
    from .tiny_diffusion import TEXT2WORLD

    for name, root, options, message in (
        (MODEL, small_world, {"disable_diffusion_decoder": True}, "disable_guardrail=True"),
        (MODEL, small_world, {}, "disable_diffusion_decoder=True runs without"),
        (TEXT2WORLD, tiny_diffusion, {}, "disable_guardrail=True.*disable_prompt_upsampler=True"),
        (KINDS["predict2.5"].name, tiny_predict2_5, {}, "disable_guardrails=True"),
    ):
        with pytest.raises(worldline.CheckpointError, match=message):
            worldline.load(name, checkpoint_dir=root, **options)


def test_pictures_are_read_like_files(plain: worldline.World, tmp_path: Path) -> None:
    """Alpha over white, 16-bit grey scaled, EXIF orientation applied."""
    picture = moving(1)[0]
    alpha = Image.fromarray(np.dstack([picture, picture[..., 0]]))
    grey = Image.fromarray(picture[..., 0].astype(np.uint16) * 257)
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 6
    forms = ((alpha, {}), (grey, {}), (turned, {"exif": turned.getexif()}))
    for number, (form, options) in enumerate(forms):
        path = tmp_path / f"{number}.png"
        form.save(path, **options)
        expected = read_image(path).frames
        assert np.array_equal(read_clip(form, "image", 1).frames, expected)
        with Image.open(path) as opened:
            assert np.array_equal(read_clip(opened, "image", 1).frames, expected)
    path = tmp_path / "cut.jpg"
    turned.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(worldline.InputError, match="damaged"), Image.open(path) as cut:
        plain.generate(cut)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_are_brought_to_the_cpu(device: str) -> None:
    frames = torch.from_numpy(moving(9)).to(device)
    assert np.array_equal(read_clip(frames, "video", 9).frames, moving(9))
