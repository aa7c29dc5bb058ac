"""A request to Predict2.5 from its words to its frames, and everything a world refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import CheckpointError, InputError
from worldline.loading.predict2_5 import FlowParts, find_predict2_5, load_predict2_5
from worldline.pipelines.denoise import STEP_SECONDS, Embeddings, decode
from worldline.pipelines.predict2_5 import (
    Window,
    check_request,
    check_text,
    count_steps,
    cut_windows,
    generate,
    make_request,
    notes,
)
from worldline.pipelines.requests import FlowRequest
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.sampling.flow import Conditioning, make_schedule, sample
from worldline.sampling.schedules import standard_noise
from worldline.sampling.solvers import finish
from worldline.video.convert import covering_frames, signed_to_uint8
from worldline.video.read import Clip

from ..conftest import moving
from ..tiny_predict2_5 import CONFIG, GRID, POST, PRE, SMALL

PROMPT = "a red ball rolls"
OWN_LENGTH: dict[str, Any] = {"num_video_frames": 13}  # of a chunk before it is cut
CPU = torch.device("cpu")


def load(folder: Path, name: str) -> FlowParts:
    return load_predict2_5(find_predict2_5(name, folder), CPU, torch.float32, Recorder(CPU))


@pytest.fixture(scope="module")
def post(tiny_predict2_5: Path) -> FlowParts:
    return load(tiny_predict2_5, POST.name)


@pytest.fixture(scope="module")
def pre(tiny_predict2_5: Path) -> FlowParts:
    return load(tiny_predict2_5, PRE.name)


def request(**options: Any) -> FlowRequest:
    return FlowRequest(**{"prompt": PROMPT, "negative_prompt": "fog", **SMALL, **options})


def clip(frames: int = 7) -> Clip:
    return Clip(moving(frames), 25.0)


def run(
    parts: FlowParts,
    given: Clip | None = None,
    embeddings: Embeddings | None = None,
    **options: Any,
) -> list[Step]:
    return list(generate(parts, given, request(**options), Recorder(CPU), embeddings))


def frames_of(steps: list[Step]) -> np.ndarray[Any, Any]:
    assert steps[-1].frames is not None
    return steps[-1].frames


# --- what is made


def test_progress(post: FlowParts) -> None:
    asked, recorder = request(num_input_frames=5, num_steps=3, preview_every=2), Recorder(CPU)
    steps = list(generate(post, clip(), asked, recorder))
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "denoise", "decode", "done"]
    denoised = [step for step in steps if step.kind == "denoise"]
    # "karras" evaluates once more than it is asked
    assert [(step.done, step.total) for step in denoised] == [(n, 4) for n in range(5)]
    assert len(recorder.facts[STEP_SECONDS]) == 4
    assert [step.preview is not None for step in denoised] == [False, False, True, False, True]
    pieces = [step.frames for step in steps if step.kind == "decode" and step.frames is not None]
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(pieces), frames_of(steps))
    assert frames_of(steps).shape == (9, 32, 48, 3)


def test_evaluations(post: FlowParts, pre: FlowParts) -> None:
    for steps in (1, 35):
        assert count_steps(post.files, request(num_steps=steps)) == steps + 1
        assert count_steps(pre.files, request(num_steps=steps)) == steps


@pytest.mark.parametrize("frames", [0, 1, 5])
@pytest.mark.parametrize("name", [POST.name, PRE.name])
def test_the_request_is_what_its_parts_make(frames: int, name: str, tiny_predict2_5: Path) -> None:
    """The same video by hand, with nothing left out, cached or put off."""
    parts = load(tiny_predict2_5, name)
    dit, tokenizer, text = parts.transformer.module, parts.tokenizer.module, parts.text
    assert text is not None
    model = next(model for model in (POST, PRE) if model.name == name)
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, 9, 32, 48)
        if frames:
            pixels[:, :, :frames] = covering_frames(clip(), frames, 32, 48) / 127.5 - 1
        clean = tokenizer.encode(pixels)
        noise = standard_noise(7, clean.shape)
        known = 1 + (frames - 1) // 4 if frames else 0
        mask = torch.zeros(1, 1, *clean.shape[2:])
        mask[:, :, :known] = 1
        words = text.embed([PROMPT, "fog"])

        def network(x: torch.Tensor, times: torch.Tensor, conditional: bool) -> torch.Tensor:
            context = dit.encode_context(words[PROMPT if conditional else "fog"])
            return dit(x, times, context, dit.make_positions(GRID), condition_mask=mask)

        given = Conditioning(clean[:, :, :known], model.known_timestep) if known else None
        schedule = make_schedule(model.schedule, 2)
        latents = finish(sample(network, noise, schedule, guidance=2.0, conditioning=given))
        video = tokenizer.decode(latents)
    made = frames_of(run(parts, clip() if frames else None, num_input_frames=frames, seed=7))
    assert np.abs(made.astype(int) - signed_to_uint8(video[0])).max() <= 1


def test_seeds_words_and_guidance(post: FlowParts) -> None:
    first = frames_of(run(post, seed=1))
    assert np.array_equal(frames_of(run(post, seed=1)), first)
    for options in ({"seed": 2}, {"prompt": "snow"}, {"negative_prompt": "sun"}, {"guidance": 3}):
        assert not np.array_equal(frames_of(run(post, **{"seed": 1, **options})), first)


def test_without_guidance_the_negative_prompt_is_not_encoded(post: FlowParts) -> None:
    assert post.text is not None
    words = Embeddings(prompt=post.text.embed([PROMPT])[PROMPT])
    blind = replace(post, text=None, files=replace(post.files, text=None, why_no_text="none"))
    made = frames_of(run(blind, embeddings=words, guidance=0))
    assert np.array_equal(made, frames_of(run(post, guidance=0)))
    with pytest.raises(CheckpointError, match=r"none; .*needed for: negative_prompt"):
        check_text(blind.files, request(), words)


def test_no_negative_prompt_is_an_empty_one(post: FlowParts) -> None:
    made = frames_of(run(post, negative_prompt=None))
    assert np.array_equal(made, frames_of(run(post, negative_prompt="")))


def test_embeddings_in_place_of_prompts(post: FlowParts) -> None:
    assert post.text is not None
    words = post.text.embed([PROMPT, "fog"])
    expected = frames_of(run(post))
    for pick in (lambda one: one, lambda one: one[0]):
        given = Embeddings(pick(words[PROMPT]), pick(words["fog"]))
        assert np.array_equal(frames_of(run(post, embeddings=given, prompt=None)), expected)


def test_an_image(post: FlowParts) -> None:
    """What comes before the last frame has no say, and one frame is enough."""
    made = frames_of(run(post, clip(7), num_input_frames=1))
    alone = Clip(moving(7)[-1:], 0.0)
    assert np.array_equal(frames_of(run(post, alone, num_input_frames=1)), made)


def test_one_frame_is_a_picture(post: FlowParts) -> None:
    assert frames_of(run(post, num_video_frames=1)).shape == (1, 32, 48, 3)


# --- long videos


def test_the_windows_of_a_long_video(post: FlowParts) -> None:
    """Chunks share their overlap alone, fill the whole length, and each has its own seed."""
    for frames, size, overlap in ((77, 77, 1), (20, 13, 1), (30, 13, 5), (14, 9, 5), (9, 13, 1)):
        asked = request(num_video_frames=frames, chunk_size=size, chunk_overlap=overlap, seed=4)
        windows = cut_windows(post.files, asked)
        assert sum(window.last - window.first for window in windows) == frames
        assert all(window.last <= size for window in windows)
        assert [window.first for window in windows] == [0] + [overlap] * (len(windows) - 1)
        assert [window.request.seed for window in windows] == [4 + n for n in range(len(windows))]
        for window in windows:
            # the length that the models know, whatever is kept of it
            assert window.request.num_video_frames == post.files.defaults.num_video_frames
            assert window.request.chunk_size is None
    assert cut_windows(post.files, request(seed=4)) == [Window(0, request(seed=4), 0, 9)]
    last = request(num_video_frames=20, chunk_size=13, seed=2**32 - 1)
    assert cut_windows(post.files, last)[1].request.seed == 0


def test_a_window_is_cut() -> None:
    pieces = iter(torch.linspace(-1, 1, 20).view(5, 1, 1, 4, 1, 1).expand(5, 1, 3, 4, 1, 1))
    frames = np.zeros((8, 1, 1, 3), np.uint8)
    steps = list(decode(pieces, frames, 2, first=5, last=11))
    wanted = [int(255 * frame / 19) for frame in range(5, 11)]
    assert frames[:, 0, 0, 0].tolist() == [0, 0, *wanted]
    assert [step.done for step in steps] == [5, 8]
    assert len(list(pieces)) == 2  # those behind are not asked for


def test_a_long_video_is_its_chunks(tiny_predict2_5: Path) -> None:
    """Each by itself, given the last frames of the one before, and joined by hand."""
    parts = load(tiny_predict2_5, POST.name)
    parts = replace(
        parts, files=replace(parts.files, defaults=replace(parts.files.defaults, **OWN_LENGTH))
    )
    size, overlap = 9, 5
    long = {"num_video_frames": 17, "chunk_size": size, "chunk_overlap": overlap}
    steps = run(parts, clip(), num_input_frames=1, seed=3, **long)
    made = frames_of(steps)
    alone = frames_of(run(parts, clip(), num_input_frames=1, seed=3, num_video_frames=13))[:size]
    joined = alone
    for number in (1, 2):
        given = Clip(joined[-overlap:], 16.0)
        options = {"num_input_frames": overlap, "seed": 3 + number, "num_video_frames": 13}
        joined = np.concatenate([joined, frames_of(run(parts, given, **options))[overlap:size]])
    assert np.array_equal(made, joined)
    assert len(made) == 17
    denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
    assert denoised == [(window + n, 9) for window in (0, 3, 6) for n in range(4)]
    pieces = [step.frames for step in steps if step.kind == "decode" and step.frames is not None]
    assert np.array_equal(np.concatenate(pieces), made)
    assert [step.done for step in steps if step.kind == "decode"][-1] == 17


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_video_frames": 10}, r"must be 1 \+ 4k and at most 509: the nearest is 9$"),
        ({"num_video_frames": 513}, r"the nearest is 509 \(chunk_size makes longer videos\)"),
        ({"num_video_frames": 601}, "at most 509"),
        ({"height": 40}, r"height is 40; it must be a multiple of 16 .* the nearest is 32"),
        ({"width": 1936}, "at most 1920: the nearest is 1920"),
        ({"num_input_frames": 9}, "nothing is left to make; give 13 frames or more"),
        ({"chunk_size": 94}, "chunk_size is 94; it must be at most 93"),
        ({"chunk_size": 77, "height": 40}, "height is 40"),
    ],
)
def test_sizes(post: FlowParts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_request(post.files, request(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_input_frames": 2}, "num_input_frames is 2; it must be 0 or 1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance": -1}, "guidance is -1"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"chunk_size": 77, "chunk_overlap": 2}, r"be 1 \+ 4k: the nearest is 1"),
        ({"chunk_size": 77, "chunk_overlap": 4}, r"be 1 \+ 4k: the nearest is 5"),
        ({"chunk_size": 77, "chunk_overlap": 0}, "chunk_overlap is 0; it must be 1 to"),
        ({"chunk_size": 5, "chunk_overlap": 5}, "chunk_size is 5, but 5 frames of a chunk"),
        ({"chunk_size": 4, "num_input_frames": 5}, "chunk_size is 4, but 5 frames"),
        ({"chunk_size": 7.5}, "chunk_size is 7.5"),
        ({"chunk_overlap": 5}, "chunk_overlap is 5, but without a chunk_size"),
    ],
)
def test_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        request(**options)


def test_inputs_that_are_absent_or_short(post: FlowParts) -> None:
    with pytest.raises(InputError, match="no input, but num_input_frames is 1"):
        run(post, num_input_frames=1)
    with pytest.raises(InputError, match="the clip has 4 frames, but 5 are needed"):
        run(post, clip(4), num_input_frames=5)


def test_embeddings_of_another_encoder(post: FlowParts) -> None:
    width = CONFIG.feature_width
    for wrong in (
        torch.zeros(3, width + 1),
        torch.zeros(2, 3, width),
        torch.zeros(0, width),
        torch.zeros(3, width, dtype=torch.int64),
    ):
        with pytest.raises(InputError, match="the embedding of negative_prompt is"):
            check_text(post.files, request(), Embeddings(negative=wrong))
    with pytest.raises(InputError, match="no prompt"):
        check_text(post.files, request(prompt=None))


def test_defaults_and_notes(post: FlowParts) -> None:
    asked = make_request(post.files, prompt=PROMPT)
    assert (asked.num_video_frames, asked.height, asked.width, asked.fps) == (93, 704, 1280, 16)
    assert notes(post.files, asked) == []
    said = " ".join(notes(post.files, request(fps=24)))
    for word in ("9 frames at once", "32 x 48", "fps is 24"):
        assert word in said
    with pytest.raises(InputError, match="unknown option sampler"):
        make_request(post.files, sampler="x")
