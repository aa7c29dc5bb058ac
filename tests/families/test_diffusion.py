"""A request to a diffusion model from its prompt to its frames, and what its family refuses."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import CheckpointError, InputError
from worldline.families import denoise
from worldline.families.diffusion import family
from worldline.families.diffusion.model import DiT
from worldline.family import Opened, Parts
from worldline.nn.pieces import fit_colours
from worldline.report import Recorder
from worldline.request import NEGATIVE_PROMPT
from worldline.sampling.edm import Conditioning, make_sigmas, sample
from worldline.sampling.solvers import Steps, finish, standard_noise
from worldline.shapes import LatentShape
from worldline.step import Step
from worldline.video.convert import signed_to_uint8, stretched_frames
from worldline.video.read import Clip
from worldline.weights.checkpoint import save

from ..conftest import moving
from ..offloading import streamed
from ..tiny_diffusion import CONTEXT_LENGTH, CONTEXT_WIDTH, TEXT2WORLD, VIDEO2WORLD
from . import worlds
from .worlds import CPU, PROMPT, clip, frames_of, load_named, open_named, pieces_of, without_text

SMALL: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "fog",
    "num_video_frames": 17,
    "height": 32,
    "width": 48,
    "num_steps": 2,
    "guidance": 2.0,
}
ZEROS = torch.zeros(1, CONTEXT_LENGTH, CONTEXT_WIDTH)


@pytest.fixture(scope="module")
def text2world(tiny_diffusion: Path) -> Parts:
    return load_named(TEXT2WORLD, tiny_diffusion)


@pytest.fixture(scope="module")
def video2world(tiny_diffusion: Path) -> Parts:
    return load_named(VIDEO2WORLD, tiny_diffusion)


def checked(opened: Opened, **options: Any) -> Any:
    return worlds.checked(opened, **{**SMALL, **options})


def run(parts: Parts, *inputs: Any, **options: Any) -> list[Step]:
    return worlds.run(parts, *inputs, **{**SMALL, **options})


def test_progress(video2world: Parts) -> None:
    recorder = Recorder(CPU)
    steps = run(video2world, clip(), recorder, num_input_frames=9, num_steps=4, preview_every=2)
    kinds = list(dict.fromkeys(step.kind for step in steps))
    assert kinds == ["text", "encode", "denoise", "decode", "done"]
    denoised = [step for step in steps if step.kind == "denoise"]
    assert [(step.done, step.total) for step in denoised] == [(n, 4) for n in range(5)]
    assert len(recorder.facts["seconds_of_steps"]) == 4
    assert [step.preview is not None for step in denoised] == [False, False, True, False, True]
    looks = [step.preview.shape for step in denoised if step.preview is not None]
    assert looks == [(3, 8, 12, 3)] * 2
    assert np.array_equal(pieces_of(steps), frames_of(steps))
    assert frames_of(steps).shape == (17, 32, 48, 3)


def test_colours_of_previews_are_fitted_once(
    video2world: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, fits = replace(video2world), []

    def fit(tokenizer: Any) -> torch.Tensor:
        fits.append(tokenizer)
        return fit_colours(tokenizer)

    monkeypatch.setattr("worldline.nn.pieces.fit_colours", fit)
    for _ in range(2):
        run(fresh, clip(), num_input_frames=1, preview_every=1)
    assert len(fits) == 1


@pytest.mark.parametrize("sampler", ["edm_euler", "res_2ab", "res_1euler", "res_2mid"])
def test_every_sampler(sampler: str, text2world: Parts) -> None:
    steps = run(text2world, sampler=sampler, num_steps=4)
    assert frames_of(steps).std() > 1
    counts = [(s.done, s.total) for s in steps if s.kind == "denoise"]
    assert counts[-1][0] == counts[-1][1]


def test_stages(text2world: Parts, video2world: Parts) -> None:
    for parts, given, stages in (
        (text2world, None, ["text", "denoise", "decode"]),
        (video2world, clip(), ["text", "encode", "denoise", "decode"]),
    ):
        recorder = Recorder(CPU)
        run(parts, given, recorder, num_input_frames=9 if given else 0)
        assert [stage.name for stage in recorder.stages] == stages


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("sampler", ["edm_euler", "res_2ab"])
def test_a_request_is_what_its_parts_make(frames: int, sampler: str, video2world: Parts) -> None:
    """The same video by hand, with nothing omitted, cached or deferred."""
    dit, tokenizer = video2world.transformer.module, video2world.tokenizer.module
    statistics, text = video2world.opened["tokenizer"].statistics, video2world.text
    assert text is not None
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, 17, 32, 48)
        pixels[:, :, :frames] = stretched_frames(clip(), frames, 32, 48)
        clean = 0.5 * statistics.normalise(tokenizer.encode(pixels))
        noise = standard_noise(7, clean.shape)
        known = 1 + (frames - 1) // 8
        mask = torch.zeros(1, 1, *clean.shape[2:])
        mask[:, :, :known] = 1
        words = text.embed([PROMPT, "fog"])
        positions = dit.make_positions(LatentShape(3, 4, 6), 30.0, rotary_dtype=torch.bfloat16)

        def network(x: torch.Tensor, times: torch.Tensor, conditional: bool) -> torch.Tensor:
            context = dit.encode_context(words[PROMPT if conditional else "fog"])
            return dit(x, times, context, positions, condition_mask=mask)

        given = Conditioning(clean[:, :, :known], noise[:, :, :known], 0.001)
        settings: dict[str, Any] = {"sampler": sampler, "num_steps": 2, "guidance": 2.0}
        latents = finish(sample(network, noise, conditioning=given, **settings))
        video = tokenizer.decode(statistics.denormalise(latents / 0.5))
    expected = signed_to_uint8(video[0])
    options = {"num_input_frames": frames, "sampler": sampler, "seed": 7, "fps": 30}
    made = frames_of(run(video2world, clip(), **options))
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_seeds_and_words_matter(text2world: Parts) -> None:
    plain = frames_of(run(text2world, seed=3))
    assert np.array_equal(frames_of(run(text2world, seed=3)), plain)
    for change in (
        {"seed": 4},
        {"prompt": "rain"},
        {"negative_prompt": "rain"},
        {"guidance": 3.0},
    ):
        assert not np.array_equal(frames_of(run(text2world, **{"seed": 3, **change})), plain)


def test_only_the_last_frames_matter(video2world: Parts) -> None:
    frames = moving(12)
    whole = frames_of(run(video2world, Clip(frames, 25.0), num_input_frames=9))
    for changed, fps, same in ((slice(0, 3), 12.0, True), (slice(5, 6), 25.0, False)):
        other = frames.copy()
        other[changed] = 0
        made = frames_of(run(video2world, Clip(other, fps), num_input_frames=9))
        assert np.array_equal(made, whole) == same


def test_a_model_that_does_both(video2world: Parts) -> None:
    """Without an input the condition mask marks nothing; both kinds may go without negative."""
    both = worlds.reopened(video2world, settings={"text2world": True})
    assert frames_of(run(both)).shape == (17, 32, 48, 3)
    one = partial(run, both, clip(), num_input_frames=1, negative_prompt="")
    assert not np.array_equal(frames_of(one()), frames_of(one(guidance=0)))


def test_without_a_negative_prompt(
    text2world: Parts, video2world: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    """Text2World is led away from zeros; Video2World from its own prompt, with a warning."""
    zeros = frames_of(run(text2world, negative_prompt_embeddings=ZEROS))
    for absent in (None, ""):
        assert np.array_equal(frames_of(run(text2world, negative_prompt=absent)), zeros)
    assert not caplog.records
    kept = frames_of(run(video2world, clip(), num_input_frames=1, negative_prompt=None))
    assert "guidance does nothing" in caplog.text
    unguided = frames_of(run(video2world, clip(), num_input_frames=1, guidance=0))
    assert np.array_equal(kept, unguided)


def test_evaluations_of_the_network(video2world: Parts) -> None:
    """Twice a step with guidance, once where that would do nothing."""
    calls: list[int] = []
    hook = video2world.transformer.module.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for options in ({}, {"negative_prompt": None}, {"guidance": 0}):
        calls.clear()
        run(video2world, clip(), num_input_frames=1, num_steps=3, **options)
        counts.append(len(calls))
    hook.remove()
    assert counts == [6, 3, 3]


@pytest.mark.parametrize("kind", ["text", "encode", "denoise", "decode"])
def test_closed_in_the_middle(video2world: Parts, kind: str) -> None:
    """Weights go home, and neither the caller nor the next request notices."""
    whole = frames_of(run(video2world, clip(), num_input_frames=9))
    module = video2world.transformer.module
    part = streamed(module, DiT.BLOCKS)
    parts = replace(video2world, loaded={**video2world.loaded, "transformer": part})
    home = [parameter.data_ptr() for parameter in module.parameters()]
    recorder = Recorder(CPU)
    steps = family.generate(parts, clip(), checked(parts.opened, num_input_frames=9), recorder)
    for step in steps:
        assert not torch.is_inference_mode_enabled()
        if step.kind == kind and step.done == (kind == "denoise"):
            break
    if kind == "denoise":
        assert [parameter.data_ptr() for parameter in module.parameters()] != home
    steps.close()  # type: ignore[attr-defined]
    assert [parameter.data_ptr() for parameter in module.parameters()] == home
    assert not any(layer._forward_hooks for layer in module.modules())
    assert not torch.is_inference_mode_enabled()
    if kind == "denoise":
        assert recorder.stages[-1].name == kind  # recorded, though it did not end
    assert np.array_equal(frames_of(run(parts, clip(), num_input_frames=9)), whole)


def test_an_error_comes_through_and_keeps_nothing(
    video2world: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed request's tensors go with the error, not with the next collection of garbage."""
    held: list[weakref.ref[torch.Tensor]] = []

    def forward(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        held.append(weakref.ref(x))
        raise KeyError("gone")

    monkeypatch.setattr(video2world.transformer.module, "forward", forward)
    gc.disable()
    try:
        with pytest.raises(KeyError, match="gone"):
            run(video2world, clip(), num_input_frames=1)
    finally:
        gc.enable()
    assert held[0]() is None


def test_the_old_fault_can_be_had(video2world: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known latents come out too large, by 2 less the ratio of two noise levels.

    An estimate has them twice while they are held. The last step that holds them goes that far from
    the state, which has them once; what follows changes next to nothing.
    """
    made, known = [], []

    def watched(*args: Any, **options: Any) -> Steps:
        made.append((yield from sample(*args, **options)))
        known.append(options["conditioning"].latents)
        return made[-1]

    monkeypatch.setattr(family, "sample", watched)
    for kind in ("corrected", "march_2025"):
        options = {"num_input_frames": 1, "num_steps": 35, "guidance": 0}
        run(video2world, clip(), reinsertion=kind, **options)
    scales = [
        ((latents[:, :, :1] * clean).sum() / clean.square().sum()).item()
        for latents, clean in zip(made, known, strict=True)
    ]
    sigmas = make_sigmas("edm_euler", 35)
    held = int((sigmas > 0.001).sum())
    ratio = float(sigmas[held] / sigmas[held - 1])
    assert 0.3 < ratio < 0.6
    assert scales == pytest.approx([1, 2 - ratio], abs=0.01)


def test_prompts_are_encoded_once(tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = frames_of(run(load_named(TEXT2WORLD, tiny_diffusion)))
    monkeypatch.setattr("worldline.text.encoder.load_into", None)  # is not called again
    fresh = load_named(TEXT2WORLD, tiny_diffusion)
    assert np.array_equal(frames_of(run(fresh)), first)
    with pytest.raises(TypeError):
        run(fresh, prompt="another")


def test_embeddings_in_place_of_prompts(text2world: Parts, tmp_path: Path) -> None:
    text = text2world.text
    assert text is not None
    expected = frames_of(run(text2world))
    words = {"prompt": text.embed([PROMPT])[PROMPT], "negative_prompt": text.embed(["fog"])["fog"]}
    save(words, tmp_path / "both.safetensors")
    save({"x": words["prompt"][0]}, tmp_path / "one.pt")
    trimmed = words["prompt"][:, : len(PROMPT) + 1]
    assert not words["prompt"][:, len(PROMPT) + 1 :].any()
    for prompt, negative in (
        (tmp_path / "both.safetensors", None),
        (str(tmp_path / "one.pt"), tmp_path / "both.safetensors"),
        (trimmed, words["negative_prompt"][0].numpy()),
    ):
        given = {"prompt_embeddings": prompt, "negative_prompt_embeddings": negative}
        made = run(without_text(text2world), prompt=None, **given)
        assert np.array_equal(frames_of(made), expected)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.ones(3, CONTEXT_WIDTH + 1), r"float32 \(3, 25\); it must be"),
        (torch.ones(2, 3, CONTEXT_WIDTH), r"floating and finite, \(S, 24\)"),
        (torch.ones(CONTEXT_LENGTH + 1, CONTEXT_WIDTH), "with S up to 40"),
        (torch.ones(3, CONTEXT_WIDTH, dtype=torch.int64), "int64"),
        (torch.full((3, CONTEXT_WIDTH), float("nan")), "finite"),
        (3, "prompt_embeddings is a int"),
        ("absent.pt", r"absent\.pt"),
        ("several.safetensors", "holds a, b"),
        ("damaged.safetensors", r"damaged\.safetensors"),
    ],
)
def test_wrong_embeddings(embedding: Any, message: str, text2world: Parts, tmp_path: Path) -> None:
    save({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "several.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    given = tmp_path / embedding if isinstance(embedding, str) else embedding
    with pytest.raises(InputError, match=message):
        checked(text2world.opened, prompt_embeddings=given)


def test_a_missing_text_encoder(own_diffusion: Path) -> None:
    (own_diffusion / "google-t5").rename(own_diffusion / "elsewhere")
    opened = open_named(TEXT2WORLD, own_diffusion)
    with pytest.raises(CheckpointError, match=r"google-t5/t5-11b.*prompt.*text_encoder_dir"):
        checked(opened)
    given = torch.ones(1, 4, CONTEXT_WIDTH)
    with pytest.raises(CheckpointError, match="needed for negative_prompt"):
        checked(opened, prompt_embeddings=given)
    for fine in ({"negative_prompt": ""}, {"guidance": 0}):
        checked(opened, prompt_embeddings=given, **fine)
    with pytest.raises(InputError, match="no prompt; give prompt"):
        checked(opened, prompt=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_video_frames": 16}, r"is 16; it must be 1 \+ 8k .* at most 41: the nearest is 17"),
        ({"num_video_frames": 121}, "the nearest is 41"),
        ({"height": 30}, "height is 30; it must be a multiple of 16, at most 96.* is 32"),
        ({"width": 1280}, "width is 1280; .* at most 128: the nearest is 128"),
        ({"height": 4}, "the nearest is 16"),
        ({"num_video_frames": 2}, "the nearest is 9"),  # one frame alone is given already
        ({"num_input_frames": 9, "num_video_frames": 10}, "the nearest is 17"),
        ({"num_input_frames": 9, "num_video_frames": 9}, "the nearest is 17"),
        ({"num_input_frames": 1, "num_video_frames": 1}, "the nearest is 9"),
        (
            {"num_video_frames": 16, "height": 30, "width": 1280},
            r"is 17\nheight .* is 32\nwidth .* is 128",
        ),
        ({"num_input_frames": 0}, "is a Video2World model; give an image or a video"),
        ({"sampler": "res_2mid", "num_steps": 1}, "num_steps is 1; .* res_2mid needs 2 or more"),
        ({"sampler": "res_2ab", "reinsertion": "march_2025"}, "edm_euler; res_2ab never"),
    ],
)
def test_what_a_model_cannot_do(options: dict[str, Any], message: str, video2world: Parts) -> None:
    with pytest.raises(InputError, match=message):
        checked(video2world.opened, **{"num_input_frames": 1, **options})


@pytest.mark.parametrize("temporal", [4, 8])
@pytest.mark.parametrize("given", [0, 1, 9])
def test_the_nearest_size_is_allowed(
    temporal: int, given: int, text2world: Parts, video2world: Parts
) -> None:
    opened = (video2world if given else text2world).opened
    tokenizer = opened["tokenizer"]
    other = replace(tokenizer.config, patch=2, temporal=temporal)
    parts = {**opened.parts, "tokenizer": replace(tokenizer, config=other)}
    opened = replace(opened, parts=parts)
    for name in ("num_video_frames", "height", "width"):
        for size in range(1, 150):
            try:
                checked(opened, **{"num_input_frames": given, name: size})
            except InputError as error:
                found = re.search(r"nearest is (\d+)", str(error))
                assert found
                checked(opened, **{"num_input_frames": given, name: int(found[1])})


def test_text2world_continues_nothing(text2world: Parts) -> None:
    with pytest.raises(InputError, match="is a Text2World model without inputs"):
        checked(text2world.opened, num_input_frames=1)


def test_sizes_that_fit(text2world: Parts) -> None:
    for sizes in ((1, 16, 16), (41, 96, 128), (9, 64, 16)):
        options = dict(zip(("num_video_frames", "height", "width"), sizes, strict=True))
        checked(text2world.opened, **options)
        if sizes[0] < 41:
            assert frames_of(run(text2world, **options)).shape == (*sizes, 3)


def test_defaults_are_those_of_the_model(text2world: Parts) -> None:
    opened = text2world.opened
    made = family.DiffusionRequest.make({"prompt": "x", "height": 64}, opened.defaults, None)
    assert (made.num_video_frames, made.height, made.width) == (17, 64, 48)
    assert (made.guidance, made.num_steps, made.seed) == (2.0, 3, 1)
    assert made.negative_prompt == NEGATIVE_PROMPT


def test_samplers_of_the_generations(tiny_diffusion: Path) -> None:
    for generation, sampler in (("Predict1", "edm_euler"), ("1.0", "res_2ab")):
        opened = open_named(TEXT2WORLD, tiny_diffusion, generation=generation)
        assert checked(opened).sampler == sampler
        assert checked(opened, sampler="res_2mid").sampler == "res_2mid"


def test_unusual_frame_rates_are_noted(text2world: Parts) -> None:
    opened = text2world.opened
    assert not family.notes(opened, checked(opened, fps=24))
    [note] = family.notes(opened, checked(opened, fps=60))
    assert "fps is 60" in note
    assert "12 to 40" in note


def test_fields_without_effect(text2world: Parts, video2world: Parts) -> None:
    both = {"prompt_embeddings": ZEROS, "negative_prompt_embeddings": ZEROS}
    names = {"text_encoder_dir", "text_encoder_dtype", "offload_text_encoder_model", "text"}
    unused = denoise.unused(text2world.opened, checked(text2world.opened, **both, guidance=0))
    negative = {"negative_prompt", "negative_prompt_embeddings"}
    conditioning = {"reinsertion", "augment_sigma"}
    assert unused.keys() == names | negative | conditioning | {"guidance_parallel"}
    asked = checked(video2world.opened, num_input_frames=1)
    assert not denoise.unused(video2world.opened, asked)
