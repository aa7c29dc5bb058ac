"""Video2World models and the diffusion decoder through the Python interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS
from worldline.errors import CheckpointError, InputError
from worldline.families.autoregressive.model import make_positions
from worldline.pipelines.autoregressive import Job, generate_together
from worldline.pipelines.requests import AutoregressiveRequest
from worldline.report import Recorder
from worldline.video.convert import condition_frames
from worldline.weights.write import save
from worldline.world import read_clip
from worldline.world.autoregressive import AutoregressiveWorld

from .conftest import MODEL
from .offloading import stand_for_a_gpu
from .tiny_decoder import CONTEXT_LENGTH, CONTEXT_WIDTH, VIDEO2WORLD

PROMPT = "A ball rolls."
OFFLOADED: dict[str, Any] = dict.fromkeys(AUTOREGRESSIVE_OFFLOAD_FLAGS, True)


@pytest.fixture(scope="module")
def world(whole_world: Path) -> AutoregressiveWorld:
    """A Video2World model with its diffusion decoder."""
    found = worldline.load(VIDEO2WORLD, whole_world, disable_guardrail=True)
    assert isinstance(found, AutoregressiveWorld)
    return found


@pytest.fixture(scope="module")
def plain(whole_world: Path) -> AutoregressiveWorld:
    """The same without the decoder."""
    found = worldline.load(
        VIDEO2WORLD, whole_world, disable_guardrail=True, disable_diffusion_decoder=True
    )
    assert isinstance(found, AutoregressiveWorld)
    return found


def test_generate_and_save(world: AutoregressiveWorld, clip: Path, tmp_path: Path) -> None:
    video = world.generate(clip, prompt=PROMPT, seed=1)
    assert video.frames.shape == (33, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.prompt == PROMPT
    path = video.save(tmp_path / "out.mp4")
    assert path.with_suffix(".txt").read_text() == PROMPT
    assert json.loads(path.with_suffix(".json").read_text()) == video.report
    again = world.generate(clip, prompt=PROMPT, seed=1)
    assert np.array_equal(again.frames, video.frames)


def test_stream(world: AutoregressiveWorld, clip: Path) -> None:
    steps = list(world.stream(clip, prompt=PROMPT))
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "tokens", "denoise", "decode", "done"]
    denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
    assert denoised == [(done, 15) for done in range(16)]
    pieces = [step.frames for step in steps if step.kind == "decode" and step.frames is not None]
    assert len(pieces) > 1  # frames come before the last of them is decoded
    assert steps[-1].frames is not None
    assert np.array_equal(np.concatenate(pieces), steps[-1].frames)
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]


def test_a_stream_may_be_left(world: AutoregressiveWorld, clip: Path) -> None:
    steps = world.stream(clip, prompt=PROMPT)
    assert any(step.kind == "denoise" for step in steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(world.generate(clip, prompt=PROMPT).frames) == 33


def test_tokens_are_those_of_the_model_called_plainly(
    plain: AutoregressiveWorld, clip: Path
) -> None:
    """A begin token first, all rows of the context seen, those of zeros too."""
    parts = plain.parts
    request = AutoregressiveRequest(prompt=PROMPT, temperature=0)
    frames = read_clip(clip, "video", 9)
    recorder = Recorder(plain.device)
    *_, last = generate_together(parts, [Job(frames, request, recorder)], recorder)
    model, tokenizer, config = parts.transformer.module, parts.tokenizer.module, parts.config
    assert parts.text is not None
    with torch.inference_mode():
        shown = condition_frames(frames, 9, 9, 32, 48)
        given = tokenizer.encode_tokens(shown).flatten(1).long()
        ids = torch.cat([torch.tensor([[config.begin_token]]), given], dim=1)
        embedding = parts.text.embed([PROMPT])[PROMPT]
        assert embedding.shape == (1, CONTEXT_LENGTH, CONTEXT_WIDTH)
        assert not embedding[:, len(PROMPT) + 1 :].any()
        context = model.encode_context(embedding)
        positions = make_positions(config, "cpu", torch.float32)
        while ids.shape[1] < config.length:
            logits = model(ids, positions, context=context)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        grid = config.grid
        video = tokenizer.decode_tokens(ids[:, 1:].view(1, grid.frames, grid.height, grid.width))
    expected = ((video[0] * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0)
    assert last.frames is not None
    assert np.abs(last.frames.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_embeddings_are_prompts(plain: AutoregressiveWorld, clip: Path) -> None:
    assert plain.parts.text is not None
    embedding = plain.parts.text.embed([PROMPT])[PROMPT]
    by_prompt = plain.generate(clip, prompt=PROMPT, top_p=1.0)
    for given in (embedding, embedding[0, : len(PROMPT) + 1].numpy()):
        by_embedding = plain.generate(clip, prompt_embeddings=given, top_p=1.0)
        assert np.array_equal(by_embedding.frames, by_prompt.frames)
    other = plain.generate(clip, prompt="Snow falls on a road at night.", top_p=1.0)
    assert not np.array_equal(other.frames, by_prompt.frames)


def test_a_negative_prompt_is_not_dropped_in_silence(
    plain: AutoregressiveWorld, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = torch.randn(5, CONTEXT_WIDTH)
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    save({"prompt": prompt, "negative_prompt": torch.randn(5, CONTEXT_WIDTH)}, both)
    save({"prompt": prompt}, alone)
    first = plain.generate(clip, prompt_embeddings=alone)
    assert "no effect" not in caplog.text
    for _ in range(2):  # it is said once
        second = plain.generate(clip, prompt_embeddings=both)
        [warning] = caplog.messages
        assert str(both) in warning
        assert "negative_prompt" in warning
    assert np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize("decodes", [True, False])
def test_offloading_changes_no_video(
    decodes: bool,
    world: AutoregressiveWorld,
    plain: AutoregressiveWorld,
    whole_world: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every part computes during its visits to the device alone, one after another."""
    resident = world if decodes else plain
    visits = stand_for_a_gpu(monkeypatch)
    offloaded = worldline.load(
        VIDEO2WORLD,
        whole_world,
        disable_guardrail=True,
        disable_diffusion_decoder=not decodes,
        **OFFLOADED,
    )
    video = offloaded.generate(clip, prompt=PROMPT)
    decoding = ["DiT", "CosmosTokenizer"] if decodes else ["CosmosTokenizer"]
    assert visits == ["T5Encoder", "CosmosTokenizer", "ARTransformer", *decoding]
    told = {flag.removeprefix("offload_"): True for flag in OFFLOADED}
    assert video.report["offload"] == {**told, "diffusion_decoder": decodes}
    assert np.array_equal(video.frames, resident.generate(clip, prompt=PROMPT).frames)


@pytest.mark.gpu
def test_offloading_on_a_gpu(world: AutoregressiveWorld, whole_world: Path, clip: Path) -> None:
    offloaded = worldline.load(VIDEO2WORLD, whole_world, disable_guardrail=True, **OFFLOADED)
    video = offloaded.generate(clip, prompt=PROMPT)
    assert np.array_equal(video.frames, world.generate(clip, prompt=PROMPT).frames)
    assert all(video.report["offload"].values())


def test_offloading_a_decoder_that_does_not_run(
    whole_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"disable_diffusion_decoder": True, "offload_diffusion_decoder": True}
    with caplog.at_level("INFO"):
        worldline.load(MODEL, whole_world, disable_guardrail=True, **options)  # type: ignore[arg-type]
    assert "offload_diffusion_decoder has no effect" in caplog.text


def test_the_discrete_decode_is_not_run(
    world: AutoregressiveWorld, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr(world.parts.tokenizer.module, "decode_tokens", decode)
    assert len(world.generate(clip, prompt=PROMPT).frames) == 33


@pytest.mark.parametrize("length", [33, 57])
def test_seams(world: AutoregressiveWorld, clip: Path, length: int) -> None:
    """57 frames are one window, which has none."""
    frames = [
        world.generate(clip, prompt=PROMPT, decoder_seam=seam, num_video_frames=length).frames
        for seam in ("corrected", "as_released")
    ]
    assert np.array_equal(*frames)


def test_base_models_use_the_general_prompt(whole_world: Path, clip: Path) -> None:
    world = worldline.load(MODEL, whole_world, disable_guardrail=True)
    assert isinstance(world, AutoregressiveWorld)
    assert not world.video2world
    assert world.parts.decoder is not None
    assert world.parts.decoder.context is not None
    report = world.generate(clip).report
    assert report["diffusion_decoder"]["sampler"] == "edm_euler"
    for wrong in ({"prompt": PROMPT}, {"prompt_embeddings": torch.zeros(1, CONTEXT_WIDTH)}):
        with pytest.raises(InputError, match="is a base model, which takes no prompt"):
            world.generate(clip, **wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is a Video2World model, which needs a prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 5}, "prompt is a int; it must be text"),
        ({"prompt": "\ud800"}, "prompt is no valid text"),
        ({"prompt": "x", "decoder_seam": "y"}, "must be one of corrected, as_released"),
        ({"prompt_embeddings": 5}, "prompt_embeddings is a int; give a file or tensor"),
        ({"prompt_embeddings": torch.zeros(1, 3)}, "it must be floating and finite"),
        ({"prompt_embeddings": "nowhere"}, "no file of embeddings nowhere"),
        ({"prompt": "x", "negative_prompt": "y"}, "unknown option negative_prompt"),
    ],
)
def test_wrong_options(
    options: dict[str, object], message: str, plain: AutoregressiveWorld, clip: Path
) -> None:
    with pytest.raises(InputError, match=message):
        plain.stream(clip, **options)


def test_wrong_parts(whole_world: Path, small_world: Path) -> None:
    with pytest.raises(CheckpointError, match="--disable_diffusion_decoder does without"):
        worldline.load(MODEL, small_world, disable_guardrail=True)
    with pytest.raises(InputError, match="--disable_guardrail"):
        worldline.load(MODEL, whole_world)
    with pytest.raises(
        InputError, match="is an autoregressive base world, which has no offload_text_encoder"
    ):
        worldline.load(MODEL, whole_world, disable_guardrail=True, offload_text_encoder_model=True)
