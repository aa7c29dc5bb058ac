"""Clips longer than the window, and several in step, on random weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline.errors import InputError
from worldline.world import AutoregressiveWorld

from ..conftest import MODEL, moving
from ..tiny_decoder import VIDEO2WORLD

WAYS = ("tokens", "pixels")


@pytest.fixture(scope="module")
def plain(small_world: Path) -> AutoregressiveWorld:
    """Decodes by its tokenizer."""
    return load(small_world, MODEL, disable_diffusion_decoder=True)


@pytest.fixture(scope="module")
def whole(whole_world: Path) -> AutoregressiveWorld:
    """Reads prompts, and decodes by diffusion."""
    return load(whole_world, VIDEO2WORLD)


def load(root: Path, name: str, **options: Any) -> AutoregressiveWorld:
    world = worldline.load(name, root, device="cpu", disable_guardrail=True, **options)
    assert isinstance(world, AutoregressiveWorld)
    return world


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [1, 9])
def test_a_longer_video_begins_with_the_shorter(
    plain: AutoregressiveWorld, way: str, given: int
) -> None:
    frames = moving()
    shorter = plain.generate(frames, num_input_frames=given, seed=1).frames
    assert len(shorter) == 33
    for length in (33, 41, 57, 81):
        video = plain.generate(
            frames, num_input_frames=given, seed=1, num_video_frames=length, rollout=way
        )
        assert len(video.frames) == length
        assert np.array_equal(video.frames[: len(shorter)], shorter)
        shorter = video.frames


def test_the_ways_differ_beyond_the_window_alone(plain: AutoregressiveWorld) -> None:
    first, second = (
        plain.generate(moving(), num_video_frames=57, rollout=way, top_p=1.0).frames for way in WAYS
    )
    assert np.array_equal(first[:33], second[:33])
    assert not np.array_equal(first[33:], second[33:])


def test_tokens_are_encoded_once(
    plain: AutoregressiveWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a window's end are carried over as they are, not made again from pixels."""
    real, calls = plain.parts.tokenizer.module.encode_tokens, []

    def encode(video: torch.Tensor) -> torch.Tensor:
        calls.append(video.shape[2])
        return real(video)

    monkeypatch.setattr(plain.parts.tokenizer.module, "encode_tokens", encode)
    plain.generate(moving(), num_video_frames=81, rollout="tokens")
    assert calls == [9]
    plain.generate(moving(), num_video_frames=81, rollout="pixels")
    assert calls == [9, 9, 9, 9]


@pytest.mark.parametrize("way", WAYS)
def test_every_frame_is_told_once(
    plain: AutoregressiveWorld, whole: AutoregressiveWorld, way: str
) -> None:
    for world, prompt in ((plain, {}), (whole, {"prompt": "A ball rolls."})):
        steps = list(world.stream(moving(), num_video_frames=57, rollout=way, **prompt))
        told = [step.frames for step in steps[:-1] if step.frames is not None]
        assert steps[-1].video is not None
        assert np.array_equal(np.concatenate(told), steps[-1].video.frames)
        counts = [step.done for step in steps if step.kind == "tokens"]
        assert counts == sorted(counts)
        assert counts[-1] == steps[-1].done == 6 * (8 - 2)


@pytest.mark.parametrize("kind", ["encode", "tokens", "denoise", "decode"])
def test_closed_in_the_middle(
    plain: AutoregressiveWorld, whole: AutoregressiveWorld, kind: str
) -> None:
    """Neither the caller nor the next request notices."""
    for world, prompt in ((plain, {}), (whole, {"prompt": "A ball rolls."})):
        expected = world.generate(moving(), seed=1, **prompt).frames
        steps = world.stream(moving(), seed=1, **prompt)
        for step in steps:
            assert not torch.is_inference_mode_enabled()
            if step.kind == kind:
                break
        steps.close()  # type: ignore[attr-defined]
        assert not torch.is_inference_mode_enabled()
        assert np.array_equal(world.generate(moving(), seed=1, **prompt).frames, expected)


def test_frames_come_as_windows_of_the_diffusion_decoder_complete(
    whole: AutoregressiveWorld,
) -> None:
    """Eight latent frames are a window, of which two are shared with the one before."""
    steps = list(whole.stream(moving(), num_video_frames=89, prompt="A ball rolls."))
    stages = [(step.kind, step.done) for step in steps if step.kind in ("denoise", "decode")]
    kinds = [kind for at, (kind, _) in enumerate(stages) if not at or stages[at - 1][0] != kind]
    assert kinds == ["denoise", "decode", "denoise", "decode"]
    assert [done for kind, done in stages if kind == "denoise"] == [*range(16), *range(15, 31)]
    told = [len(step.frames) for step in steps[:-1] if step.frames is not None]
    assert (sum(told[:2]), sum(told)) == (57, 89)


@pytest.mark.parametrize("way", WAYS)
def test_in_step_as_alone(plain: AutoregressiveWorld, whole: AutoregressiveWorld, way: str) -> None:
    inputs = [moving()[:9], moving()[::-1][:9].copy(), moving()[2:11]]
    for world, prompts in (
        (plain, [{}, {}, {}]),
        (whole, [{"prompt": "A ball."}, {"prompt": "Snow."}, {"prompt": "A ball."}]),
    ):
        each = [{"seed": seed, **prompt} for seed, prompt in zip((3, 4, 5), prompts, strict=True)]
        shared = {"num_video_frames": 49, "rollout": way, "top_p": 1.0}
        videos = finished(world.stream_batch(inputs, each, **shared))
        assert sorted(videos) == [0, 1, 2]
        for number, (input, own) in enumerate(zip(inputs, each, strict=True)):
            alone = world.generate(input, **own, **shared)
            assert np.array_equal(videos[number].frames, alone.frames)
            assert videos[number].prompt == alone.prompt
            report = videos[number].report
            assert report["clips_at_once"] == 3
            assert report["request"] == alone.report["request"]
            names = [stage["name"] for stage in report["run"]["stages"]]
            assert names == [stage["name"] for stage in alone.report["run"]["stages"]]


def test_more_than_the_kernels_take_in_step(
    plain: AutoregressiveWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn in groups; each is what it is alone, and tells of its own group alone."""
    monkeypatch.setattr(worldline.loading, "kernels_fit", lambda *_: True)
    monkeypatch.setattr(worldline.loading, "MAX_BATCH_SIZE", 2)
    ticks = itertools.count()
    monkeypatch.setattr(worldline.report.time, "perf_counter", lambda: float(next(ticks)))
    drawn, real = [], worldline.world.autoregressive.generate_together

    def generate_together(parts: Any, jobs: Sequence[Any], recorder: Any) -> Any:
        drawn.append(len(jobs))
        return real(parts, jobs, recorder)

    monkeypatch.setattr(worldline.world.autoregressive, "generate_together", generate_together)
    each = [{"seed": seed} for seed in range(5)]
    videos = finished(plain.stream_batch([moving()] * 5, each, top_p=1.0))
    assert drawn == [2, 2, 1]
    assert [videos[number].report["clips_at_once"] for number in range(5)] == [2, 2, 2, 2, 1]
    for own in each:
        alone = plain.generate(moving(), **own, top_p=1.0)
        assert np.array_equal(videos[own["seed"]].frames, alone.frames)
    spent = [
        {stage["name"]: stage["seconds"] for stage in videos[number].report["run"]["stages"]}
        for number in (0, 2)
    ]
    assert spent[0] == spent[1]
    assert spent[0]["read"] == 5  # a tick for each input


def finished(steps: Iterator[tuple[int, worldline.Step]]) -> dict[int, worldline.Video]:
    return {number: step.video for number, step in steps if step.video is not None}


def test_wrong_batches(plain: AutoregressiveWorld, image: Path) -> None:
    frames = moving()
    many = "there must be one or more, and as many of both"
    for inputs, each, message in (
        ([], [], many),
        ([frames], [], many),
        ([frames], [{"top_p": 0.5}], "unknown option top_p; of its own an input has prompt"),
        (str(image), [{}], "inputs must be a list, and each a list of as many dicts"),
        ([frames], {"seed": 1}, "inputs must be a list, and each a list of as many dicts"),
    ):
        with pytest.raises(InputError, match=message):
            plain.stream_batch(inputs, each)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be continued in step"):
        plain.stream_batch([frames, image], [{}, {}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_video_frames": 0}, "num_video_frames is 0; it must be 1 to"),
        ({"num_video_frames": 25}, "at least 33: the nearest is 33"),
        ({"num_video_frames": 1 << 20}, "the nearest is 1048569"),
        ({"num_video_frames": 50}, r"must be 1 \+ 8k and at least 33: the nearest is 49"),
        ({"num_video_frames": 1.5}, "num_video_frames is 1.5; it must be a whole number"),
        ({"rollout": "x"}, "rollout is 'x'; it must be one of tokens, pixels"),
    ],
)
def test_wrong_lengths(plain: AutoregressiveWorld, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain.stream(moving(), **options)
