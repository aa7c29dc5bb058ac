"""A request to Predict2.5 from its prompt to its frames, and what its family refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import CheckpointError, InputError
from worldline.families import denoise
from worldline.families.predict2_5 import family
from worldline.families.predict2_5.family import cut_windows
from worldline.family import Opened, Parts
from worldline.report import Recorder
from worldline.sampling.flow import Conditioning, guided_velocity, make_schedule, unipc
from worldline.sampling.solvers import finish, standard_noise
from worldline.step import Step
from worldline.video.convert import covering_frames, signed_to_uint8
from worldline.video.read import Clip

from ..conftest import moving
from ..tiny_predict2_5 import CONFIG, GRID, POST, PRE, SMALL
from . import worlds
from .worlds import CPU, PROMPT, clip, frames_of, load_named, pieces_of, reopened, without_text


@pytest.fixture(scope="module")
def post(tiny_predict2_5: Path) -> Parts:
    return load_named(POST.name, tiny_predict2_5)


@pytest.fixture(scope="module")
def pre(tiny_predict2_5: Path) -> Parts:
    return load_named(PRE.name, tiny_predict2_5)


def checked(opened: Opened, **options: Any) -> Any:
    return worlds.checked(
        opened, **{"prompt": PROMPT, "negative_prompt": "fog", **SMALL, **options}
    )


def run(parts: Parts, *inputs: Any, **options: Any) -> list[Step]:
    defaults = {"prompt": PROMPT, "negative_prompt": "fog", **SMALL}
    return worlds.run(parts, *inputs, **{**defaults, **options})


def test_progress(post: Parts) -> None:
    recorder = Recorder(CPU)
    steps = run(post, clip(7), recorder, num_input_frames=5, num_steps=3, preview_every=2)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "denoise", "decode", "done"]
    denoised = [step for step in steps if step.kind == "denoise"]
    # "karras" evaluates once more than it is asked
    assert [(step.done, step.total) for step in denoised] == [(n, 4) for n in range(5)]
    assert len(recorder.facts["seconds_of_steps"]) == 4
    assert [step.preview is not None for step in denoised] == [False, False, True, False, True]
    assert np.array_equal(pieces_of(steps), frames_of(steps))
    assert frames_of(steps).shape == (9, 32, 48, 3)


@pytest.mark.parametrize("frames", [0, 1, 5])
@pytest.mark.parametrize("model", [POST, PRE], ids=lambda model: model.name)
def test_a_request_is_what_its_parts_make(frames: int, model: Any, post: Parts, pre: Parts) -> None:
    """The same video by hand, with nothing omitted, cached or deferred."""
    parts = post if model is POST else pre
    dit, tokenizer, text = parts.transformer.module, parts.tokenizer.module, parts.text
    assert text is not None
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, 9, 32, 48)
        if frames:
            pixels[:, :, :frames] = covering_frames(clip(7), frames, 32, 48) / 127.5 - 1
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
        velocity = guided_velocity(network, noise, schedule, guidance=2.0, conditioning=given)
        latents = finish(unipc(velocity, noise, schedule.sigmas))
        video = tokenizer.decode(latents)
    made = frames_of(run(parts, clip(7) if frames else None, num_input_frames=frames, seed=7))
    assert np.abs(made.astype(int) - signed_to_uint8(video[0])).max() <= 1


def test_seeds_words_and_guidance_matter(post: Parts) -> None:
    first = frames_of(run(post, seed=1))
    assert np.array_equal(frames_of(run(post, seed=1)), first)
    for options in ({"seed": 2}, {"prompt": "snow"}, {"negative_prompt": "sun"}, {"guidance": 3}):
        assert not np.array_equal(frames_of(run(post, **{"seed": 1, **options})), first)


def test_without_guidance_the_negative_prompt_is_not_encoded(post: Parts) -> None:
    assert post.text is not None
    words = post.text.embed([PROMPT])[PROMPT]
    made = run(without_text(post), prompt_embeddings=words, guidance=0)
    assert np.array_equal(frames_of(made), frames_of(run(post, guidance=0)))
    parts = {name: part for name, part in post.opened.parts.items() if name != "text"}
    missing = replace(post.opened, parts=parts, missing={"text": "no encoder"})
    checked(missing, prompt_embeddings=words, guidance=0)
    with pytest.raises(CheckpointError, match=r"no encoder .*needed for negative_prompt"):
        checked(missing, prompt_embeddings=words)


def test_no_negative_prompt_is_an_empty_one(post: Parts) -> None:
    made = frames_of(run(post, negative_prompt=None))
    assert np.array_equal(made, frames_of(run(post, negative_prompt="")))


def test_embeddings_in_place_of_prompts(post: Parts) -> None:
    assert post.text is not None
    words = post.text.embed([PROMPT, "fog"])
    expected = frames_of(run(post))
    for pick in (lambda one: one, lambda one: one[0]):
        given = {
            "prompt_embeddings": pick(words[PROMPT]),
            "negative_prompt_embeddings": pick(words["fog"]),
        }
        made = run(without_text(post), prompt=None, **given)
        assert np.array_equal(frames_of(made), expected)


def test_an_image(post: Parts) -> None:
    """Frames before the last do not matter, and one frame is enough."""
    made = frames_of(run(post, clip(7), num_input_frames=1))
    alone = Clip(moving(7)[-1:], 0.0)
    assert np.array_equal(frames_of(run(post, alone, num_input_frames=1)), made)


def test_one_frame_is_a_picture(post: Parts) -> None:
    assert frames_of(run(post, num_video_frames=1)).shape == (1, 32, 48, 3)


def test_windows_of_a_long_video(post: Parts) -> None:
    """Chunks share their overlap alone, fill the whole length, and each has its own seed."""
    opened = post.opened
    for frames, size, overlap in ((77, 77, 1), (20, 13, 1), (30, 13, 5), (14, 9, 5), (9, 13, 1)):
        long = {"num_video_frames": frames, "chunk_size": size, "chunk_overlap": overlap}
        windows, ends = zip(*cut_windows(opened, checked(opened, seed=4, **long)), strict=True)
        assert ends == tuple(
            min(frames, size + number * (size - overlap)) for number in range(len(windows))
        )
        most = size + (len(windows) - 1) * (size - overlap)
        assert most - (size - overlap) < frames <= most or len(windows) == 1
        assert [window.seed for window in windows] == [4 + n for n in range(len(windows))]
        known = [window.num_input_frames for window in windows]
        assert known == [0] + [overlap] * (len(windows) - 1)
        # the length that the models know, whatever is kept of it
        assert {(window.num_video_frames, window.chunk_size) for window in windows} == {(93, None)}
    one = checked(opened, seed=4)
    assert cut_windows(opened, one) == [(one, 9)]
    last = checked(opened, num_video_frames=20, chunk_size=13, seed=2**32 - 1)
    assert cut_windows(opened, last)[1][0].seed == 0


def test_a_long_video_is_its_chunks(post: Parts) -> None:
    """Each by itself, given the last frames of the one before, and joined by hand."""
    parts = reopened(post, defaults={"num_video_frames": 13})
    size, overlap = 9, 5
    long = {"num_video_frames": 17, "chunk_size": size, "chunk_overlap": overlap}
    steps = run(parts, clip(7), num_input_frames=1, seed=3, **long)
    made = frames_of(steps)
    joined = frames_of(run(parts, clip(7), num_input_frames=1, seed=3, num_video_frames=13))[:size]
    for number in (1, 2):
        given = Clip(joined[-overlap:], 16.0)
        options = {"num_input_frames": overlap, "seed": 3 + number, "num_video_frames": 13}
        joined = np.concatenate([joined, frames_of(run(parts, given, **options))[overlap:size]])
    assert np.array_equal(made, joined)
    assert len(made) == 17
    denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
    assert denoised == [(window + n, 9) for window in (0, 3, 6) for n in range(4)]
    assert np.array_equal(pieces_of(steps), made)
    assert [step.done for step in steps if step.kind == "decode"][-1] == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_video_frames": 10}, r"must be 1 \+ 4k .* at most 509: the nearest is 9$"),
        ({"num_video_frames": 513}, "the nearest is 509$"),
        ({"height": 40}, r"height is 40; it must be a multiple of 16, .* the nearest is 32"),
        ({"width": 1936}, "at most 1920: the nearest is 1920"),
        ({"num_input_frames": 9}, r"above num_input_frames \(9\), .*: the nearest is 13$"),
        ({"chunk_size": 94}, "chunk_size is 94; .* 93 at once"),
        ({"chunk_size": 77, "height": 40}, "height is 40"),
        ({"prompt": None}, "no prompt; give prompt or prompt_embeddings"),
    ],
)
def test_what_a_model_cannot_do(post: Parts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(post.opened, **options)


@pytest.mark.parametrize("shape", [(3, CONFIG.feature_width + 1), (2, 3, 32), (0, 32), (3, 32)])
def test_embeddings_of_another_encoder(post: Parts, shape: tuple[int, ...]) -> None:
    dtype = torch.int64 if shape == (3, 32) else torch.float32
    with pytest.raises(InputError, match="negative_prompt_embeddings is "):
        checked(post.opened, negative_prompt_embeddings=torch.zeros(shape, dtype=dtype))


def test_defaults_and_notes(post: Parts) -> None:
    opened = post.opened
    asked = worlds.checked(opened, prompt=PROMPT)
    assert (asked.num_video_frames, asked.height, asked.width, asked.fps) == (93, 704, 1280, 16)
    assert family.notes(opened, asked) == []
    notes = " ".join(family.notes(opened, checked(opened, fps=24)))
    for words in ("9 frames at once", "32 x 48", "fps is 24"):
        assert words in notes
    own = {"num_video_frames": 9, "height": 32, "width": 48, "fps": 24}  # of its own training
    assert family.notes(replace(opened, defaults=own), checked(opened, fps=24)) == []


def test_fields_without_effect(post: Parts) -> None:
    words = torch.zeros(3, CONFIG.feature_width)
    names = {"text_encoder_dir", "offload_text_encoder", "text"}
    asked = checked(post.opened, prompt_embeddings=words, guidance=0)
    unused = {"negative_prompt", "negative_prompt_embeddings", "guidance_parallel", *names}
    assert denoise.unused(post.opened, asked).keys() == unused
    # the negative prompt is encoded
    assert not denoise.unused(post.opened, checked(post.opened, prompt_embeddings=words))
