"""Video2World models and the diffusion decoder through the Python interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline.errors import CheckpointError, InputError
from worldline.families.autoregressive.family import FAMILY, Job, generate_together
from worldline.families.autoregressive.model import make_positions
from worldline.inputs import read_clip
from worldline.report import Recorder
from worldline.video.convert import condition_frames
from worldline.weights.write import save
from worldline.world import World

from .conftest import MODEL
from .offloading import stand_for_a_gpu
from .tiny_decoder import VIDEO2WORLD
from .tiny_diffusion import CONTEXT_LENGTH, CONTEXT_WIDTH

PROMPT = "A ball rolls."
OFFLOADED: dict[str, Any] = dict.fromkeys(FAMILY.flags, True)


def load(root: Path, name: str = VIDEO2WORLD, **options: Any) -> World:
    return worldline.load(name, checkpoint_dir=root, disable_guardrail=True, **options)


@pytest.fixture(scope="module")
def world(whole_world: Path) -> World:
    """A Video2World model with its diffusion decoder."""
    return load(whole_world)


@pytest.fixture(scope="module")
def plain(whole_world: Path) -> World:
    """The same without the decoder."""
    return load(whole_world, disable_diffusion_decoder=True)


def test_generate_and_save(world: World, clip: Path, tmp_path: Path) -> None:
    video = world.generate(clip, prompt=PROMPT, seed=1)
    assert video.frames.shape == (33, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.prompt == PROMPT
    path = video.save(tmp_path / "out.mp4")
    assert path.with_suffix(".txt").read_text() == PROMPT
    assert json.loads(path.with_suffix(".json").read_text()) == video.report
    again = world.generate(clip, prompt=PROMPT, seed=1)
    assert np.array_equal(again.frames, video.frames)


def test_stream(world: World, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the diffusion decoder alone, whose frames come before the last of them is decoded."""
    monkeypatch.setattr(world.parts.tokenizer.module, "decode_piece", None)
    steps = list(world.stream(clip, prompt=PROMPT))
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "tokens", "denoise", "decode", "done"]
    denoised = [(step.done, step.total) for step in steps if step.kind == "denoise"]
    assert denoised == [(done, 15) for done in range(16)]
    pieces = [step.frames for step in steps if step.kind == "decode" and step.frames is not None]
    assert len(pieces) > 1
    assert steps[-1].frames is not None
    assert np.array_equal(np.concatenate(pieces), steps[-1].frames)
    assert [step.video is not None for step in steps] == [False] * (len(steps) - 1) + [True]


def test_a_stream_may_be_left(world: World, clip: Path) -> None:
    steps = world.stream(clip, prompt=PROMPT)
    assert any(step.kind == "denoise" for step in steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(world.generate(clip, prompt=PROMPT).frames) == 33


def test_tokens_are_those_of_the_model_called_plainly(plain: World, clip: Path) -> None:
    """A begin token first, all rows of the context seen, those of zeros too."""
    parts = plain.parts
    asked = {"prompt": PROMPT, "temperature": 0.0, "num_video_frames": 33}
    frames, recorder = read_clip(clip, "video", 9), Recorder(plain.device)
    job = Job(frames, FAMILY.request.parse(asked), recorder)
    *_, (_, last) = generate_together(parts, [job], recorder)
    model, tokenizer, config = parts.transformer.module, parts.tokenizer.module, parts.config
    assert parts.text is not None
    with torch.inference_mode():
        known = condition_frames(frames, 9, 9, 32, 48)
        given = tokenizer.encode_tokens(known).flatten(1).long()
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
        ids = ids[:, 1:].view(1, grid.frames, grid.height, grid.width)
        video = tokenizer.decode(tokenizer.to_codes(ids))
    expected = ((video[0] * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0)
    assert last.frames is not None
    assert np.abs(last.frames.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_embeddings_are_prompts(plain: World, clip: Path) -> None:
    assert plain.parts.text is not None
    embedding = plain.parts.text.embed([PROMPT])[PROMPT]
    by_prompt = plain.generate(clip, prompt=PROMPT, top_p=1.0)
    for given in (embedding, embedding[0, : len(PROMPT) + 1].numpy()):
        by_embedding = plain.generate(clip, prompt_embeddings=given, top_p=1.0)
        assert np.array_equal(by_embedding.frames, by_prompt.frames)
    other = plain.generate(clip, prompt="Snow falls on a road at night.", top_p=1.0)
    assert not np.array_equal(other.frames, by_prompt.frames)


def test_a_negative_prompt_is_not_dropped_in_silence(
    plain: World, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = torch.randn(5, CONTEXT_WIDTH)
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    save({"prompt": prompt, "negative_prompt": torch.randn(5, CONTEXT_WIDTH)}, both)
    save({"prompt": prompt}, alone)
    first = plain.generate(clip, prompt_embeddings=alone)
    assert not caplog.messages
    second = plain.generate(clip, prompt_embeddings=both)
    [warning] = caplog.messages  # once
    assert str(both) in warning
    assert "negative_prompt" in warning
    assert np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize("decodes", [True, False])
def test_offloading_changes_no_video(
    decodes: bool,
    world: World,
    plain: World,
    whole_world: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every part computes during its visits to the device alone, one after another."""
    resident = world if decodes else plain
    visits = stand_for_a_gpu(monkeypatch)
    offloaded = load(whole_world, disable_diffusion_decoder=not decodes, **OFFLOADED)
    video = offloaded.generate(clip, prompt=PROMPT)
    decoding = ["DiT", "CosmosTokenizer"] if decodes else ["CosmosTokenizer"]
    assert visits == ["T5Encoder", "CosmosTokenizer", "ARTransformer", *decoding]
    names = {flag.removeprefix("offload_") for flag in OFFLOADED}
    if not decodes:
        names.remove("diffusion_decoder")
    assert video.report["offload"] == dict.fromkeys(names, True)
    assert np.array_equal(video.frames, resident.generate(clip, prompt=PROMPT).frames)


@pytest.mark.gpu
def test_offloading_on_a_gpu(world: World, whole_world: Path, clip: Path) -> None:
    video = load(whole_world, **OFFLOADED).generate(clip, prompt=PROMPT)
    assert np.array_equal(video.frames, world.generate(clip, prompt=PROMPT).frames)
    assert all(video.report["offload"].values())


@pytest.mark.parametrize("length", [33, 57])
def test_seams(world: World, clip: Path, length: int) -> None:
    """57 frames are one window, which has none."""
    frames = [
        world.generate(clip, prompt=PROMPT, decoder_seam=seam, num_video_frames=length).frames
        for seam in ("corrected", "as_released")
    ]
    assert np.array_equal(*frames)


def test_base_models_use_the_general_prompt(whole_world: Path, clip: Path) -> None:
    world = load(whole_world, MODEL)
    assert world.parts.text is None
    assert world.parts.decoder is not None
    assert world.generate(clip).report["diffusion_decoder"]["sampler"] == "edm_euler"
    for wrong in ({"prompt": PROMPT}, {"prompt_embeddings": torch.zeros(1, CONTEXT_WIDTH)}):
        with pytest.raises(InputError, match="base model"):
            world.generate(clip, **wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a prompt"),
        ({"prompt": ""}, "prompt: it is empty"),
        ({"prompt": " \n"}, "prompt: it is empty"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "\ud800"}, "prompt: .*surrogates"),
        ({"prompt": "x", "decoder_seam": "y"}, "decoder_seam is 'y'.*corrected.*as_released"),
        ({"prompt_embeddings": 5}, "prompt_embeddings is a int"),
        ({"prompt_embeddings": torch.zeros(1, 3)}, f"prompt_embeddings.*3.*{CONTEXT_WIDTH}"),
        ({"prompt_embeddings": "nowhere"}, "nowhere"),
        ({"prompt": "x", "negative_prompt": "y"}, "negative_prompt: no such option"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, plain: World, clip: Path) -> None:
    with pytest.raises(InputError, match=message):
        plain.stream(clip, **options)


def test_wrong_parts(whole_world: Path, small_world: Path) -> None:
    for root, name, options, message in (
        (small_world, MODEL, {}, "disable_diffusion_decoder"),
        (whole_world, MODEL, {"disable_guardrail": False}, "disable_guardrail"),
        (whole_world, MODEL, {"text_encoder_dir": "x"}, "text_encoder_dir.*base model"),
    ):
        with pytest.raises((CheckpointError, InputError), match=message):
            worldline.load(name, checkpoint_dir=root, **{"disable_guardrail": True, **options})
