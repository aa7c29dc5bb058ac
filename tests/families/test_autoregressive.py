"""Clips longer than the window, and several in step, on random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline.errors import InputError
from worldline.families.autoregressive import family
from worldline.families.autoregressive.model import make_positions
from worldline.nn.pieces import CausalCache
from worldline.video.convert import condition_frames
from worldline.world import World

from ..conftest import MODEL, moving
from ..tiny_decoder import CONTEXT_LENGTH, CONTEXT_WIDTH, VIDEO2WORLD
from .worlds import PROMPT, checked, clip, frames_of, load_named, run

WAYS = ("tokens", "pixels")


@pytest.fixture(scope="module")
def plain(small_world: Path) -> World:
    """Decodes by its tokenizer."""
    return load(small_world, MODEL, disable_diffusion_decoder=True, batch_size=3)


@pytest.fixture(scope="module")
def whole(whole_world: Path) -> World:
    """Reads prompts, and decodes by diffusion."""
    return load(whole_world, VIDEO2WORLD, batch_size=3)


def load(root: Path, name: str, **options: Any) -> World:
    return worldline.load(
        name, checkpoint_dir=root, device="cpu", disable_guardrail=True, **options
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [1, 9])
def test_a_longer_video_begins_with_the_shorter(plain: World, way: str, given: int) -> None:
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


def test_the_ways_differ_beyond_the_window_alone(plain: World) -> None:
    first, second = (
        plain.generate(moving(), num_video_frames=57, rollout=way, top_p=1.0).frames for way in WAYS
    )
    assert np.array_equal(first[:33], second[:33])
    assert not np.array_equal(first[33:], second[33:])


def test_tokens_are_encoded_once(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a window's end are carried over as they are, not made again from pixels."""
    real, calls = plain.parts.tokenizer.module.encode_tokens, []

    def encode(video: torch.Tensor, cache: CausalCache) -> torch.Tensor:
        calls.append(video.shape[2])
        return real(video, cache)

    monkeypatch.setattr(plain.parts.tokenizer.module, "encode_tokens", encode)
    plain.generate(moving(), num_video_frames=81, rollout="tokens")
    assert calls == [9]
    plain.generate(moving(), num_video_frames=81, rollout="pixels")
    assert calls == [9, 9, 9, 9]


@pytest.mark.parametrize("way", WAYS)
def test_every_frame_comes_once(plain: World, whole: World, way: str) -> None:
    for world, prompt in ((plain, {}), (whole, {"prompt": "A ball rolls."})):
        steps = list(world.stream(moving(), num_video_frames=57, rollout=way, **prompt))
        pieces = [step.frames for step in steps[:-1] if step.frames is not None]
        assert steps[-1].video is not None
        assert np.array_equal(np.concatenate(pieces), steps[-1].video.frames)
        counts = [step.done for step in steps if step.kind == "tokens"]
        assert counts == sorted(counts)
        assert counts[-1] == steps[-1].done == 6 * (8 - 2)


@pytest.mark.parametrize("kind", ["encode", "tokens", "denoise", "decode"])
def test_closed_in_the_middle(plain: World, whole: World, kind: str) -> None:
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
    whole: World,
) -> None:
    """Eight latent frames are a window, of which two are shared with the one before."""
    steps = list(whole.stream(moving(), num_video_frames=89, prompt="A ball rolls."))
    stages = [(step.kind, step.done) for step in steps if step.kind in ("denoise", "decode")]
    kinds = [kind for at, (kind, _) in enumerate(stages) if not at or stages[at - 1][0] != kind]
    assert kinds == ["denoise", "decode", "denoise", "decode"]
    assert [done for kind, done in stages if kind == "denoise"] == [*range(16), *range(15, 31)]
    counts = [len(step.frames) for step in steps[:-1] if step.frames is not None]
    assert (sum(counts[:2]), sum(counts)) == (57, 89)


@pytest.mark.parametrize("way", WAYS)
def test_in_step_as_alone(plain: World, whole: World, way: str) -> None:
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


def test_more_than_are_planned_in_step(plain: World) -> None:
    """They are drawn in groups; each is what it is alone, and reports its own group alone."""
    drawn = []

    def generate_together(parts: Any, jobs: Sequence[Any], recorder: Any) -> Any:
        drawn.append(len(jobs))
        return family.generate_together(parts, jobs, recorder)

    changed = replace(family.FAMILY, generate_together=generate_together)
    opened = replace(plain.opened, family=changed)
    compute = replace(plain.parts.compute, batch_size=2)
    plain = World(replace(plain.parts, opened=opened, compute=compute), plain.guards, plain.loading)
    each = [{"seed": seed} for seed in range(5)]
    videos = finished(plain.stream_batch([moving()] * 5, each, top_p=1.0))
    assert drawn == [2, 2, 1]
    assert [videos[number].report["clips_at_once"] for number in range(5)] == [2, 2, 2, 2, 1]
    for own in each:
        alone = plain.generate(moving(), **own, top_p=1.0)
        assert np.array_equal(videos[own["seed"]].frames, alone.frames)


def finished(steps: Iterator[tuple[int, worldline.Step]]) -> dict[int, worldline.Video]:
    return {number: step.video for number, step in steps if step.video is not None}


def test_wrong_batches(plain: World, image: Path) -> None:
    frames = moving()
    many = "give two lists"
    for inputs, each, message in (
        ([], [], many),
        ([frames], [], many),
        ([frames], [{"top_p": 0.5}], "top_p: no option of one input"),
        (str(image), [{}], many),
    ):
        with pytest.raises(InputError, match=message):
            plain.stream_batch(inputs, each)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be continued in one batch"):
        plain.stream_batch([frames, image], [{}, {}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_video_frames": 0}, "num_video_frames is 0; it must be greater than or equal to 1"),
        ({"num_video_frames": 25}, "at least 33: the nearest is 33"),
        ({"num_video_frames": 50}, r"must be 1 \+ 8k and at least 33: the nearest is 49"),
        ({"num_video_frames": 1.5}, "num_video_frames is 1.5; it must be a valid integer"),
        ({"rollout": "x"}, "rollout is 'x'; it must be 'tokens' or 'pixels'"),
    ],
)
def test_wrong_lengths(plain: World, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain.stream(moving(), **options)


def test_tokens_are_those_of_the_model_called_plainly(whole: World) -> None:
    """A begin token first, all rows of the context seen, those of zeros too."""
    parts = load_named(VIDEO2WORLD, whole.opened.place.roots[0], disable_diffusion_decoder=True)
    frames = clip()
    made = frames_of(run(parts, frames, prompt=PROMPT, temperature=0))
    model, tokenizer, config = parts.transformer.module, parts.tokenizer.module, parts.config
    assert parts.text is not None
    with torch.inference_mode():
        pixels = condition_frames(frames, 9, 9, 32, 48)
        known = tokenizer.encode_tokens(pixels).flatten(1).long()
        ids = torch.cat([torch.tensor([[config.begin_token]]), known], dim=1)
        embedding = parts.text.embed([PROMPT])[PROMPT]
        assert embedding.shape == (1, CONTEXT_LENGTH, CONTEXT_WIDTH)
        assert not embedding[:, len(PROMPT) + 1 :].any()
        context = model.encode_context(embedding)
        positions = make_positions(config, "cpu", torch.float32)
        while ids.shape[1] < config.length:
            logits = model(ids, positions, context=context)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        grid = config.grid
        tokens = ids[:, 1:].view(1, grid.frames, grid.height, grid.width)
        video = tokenizer.decode(tokenizer.to_codes(tokens))
    expected = ((video[0] * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0)
    assert np.abs(made.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_tokens_are_decoded_once(whole: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole.parts.tokenizer.module, "decode", None)  # is not called
    assert len(whole.generate(moving(), prompt=PROMPT).frames) == 33


@pytest.mark.parametrize("length", [33, 57])
def test_one_window_has_no_seam(whole: World, length: int) -> None:
    frames = [
        whole.generate(moving(), prompt=PROMPT, decoder_seam=seam, num_video_frames=length).frames
        for seam in ("corrected", "as_released")
    ]
    assert np.array_equal(*frames)


def test_base_models_use_the_general_prompt(whole_world: Path) -> None:
    world = load(whole_world, MODEL)
    assert world.opened["decoder"].context is not None
    report = world.generate(moving()).report
    assert report["diffusion_decoder"]["sampler"] == "edm_euler"


def test_fields_without_effect(plain: World, whole: World) -> None:
    decoder = {"offload_diffusion_decoder", "decoder_seam", "context_parallel"}
    for world, options, names in (
        (plain, {}, {*decoder, "rollout"}),
        (plain, {"temperature": 0, "num_video_frames": 41}, {*decoder, "top_p", "seed"}),
        (whole, {"prompt": "x", "temperature": 0}, {"top_p", "rollout", "decoder_seam"}),
        (whole, {"prompt": "x", "num_video_frames": 65}, set()),
    ):
        unused = family.unused(world.opened, checked(world.opened, **options))
        assert unused.keys() - {"offload_prompt_upsampler"} == names
