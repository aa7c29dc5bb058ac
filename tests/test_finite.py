"""NaN and infinity stop a video at their step, though every weight is finite; others go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import worldline
from worldline.errors import NonFiniteError, as_flags, option
from worldline.families.autoregressive.model import ARTransformer
from worldline.families.denoise import report
from worldline.finite import check_finite, total
from worldline.guards import Checks
from worldline.report import Recorder
from worldline.sampling.solvers import Stepped, Steps, finish
from worldline.step import Step
from worldline.tokenizers.cosmos.model import CosmosTokenizer

from . import test_world
from .cli.conftest import WITHOUT_PARTS, run_words
from .conftest import TOKENIZER, moving

KINDS, load = test_world.KINDS, test_world.load  # a fixture
Load = Callable[..., worldline.World]


def overflowing(module: nn.Module, at: int) -> None:
    """Let a network's call number `at`, from 1, come out too large by finite weights."""
    calls = iter(range(1, 10_000))

    def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return (
            (output + 2 * output.sign()) * torch.finfo(output.dtype).max
            if next(calls) >= at
            else None
        )

    module.register_forward_hook(scaled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_one_number_is_found(dtype: torch.dtype, number: float) -> None:
    x = torch.full((3, 40, 50), torch.finfo(dtype).max / 10**5, dtype=dtype)  # sums are wider
    check_finite(total(x), "", dtype)
    x[1, 7, 9] = number
    with pytest.raises(NonFiniteError, match=f"frames .* in {str(dtype)[6:]};"):
        check_finite(total(x), "decode: frames", dtype)
    with pytest.raises(NonFiniteError) as caught:
        check_finite(total(x, 1, 2), "", dtype)
    assert caught.value.index == 1


def test_advice_is_a_keyword_or_a_flag() -> None:
    x = torch.tensor(torch.nan)
    with pytest.raises(NonFiniteError, match=r"dtype='bfloat16'"):
        check_finite(x, "latents", torch.float16)
    token = as_flags.set(True)
    with pytest.raises(NonFiniteError, match="--dtype bfloat16"):
        check_finite(x, "latents", torch.float16)
    assert option("offload_tokenizer", True) == "--offload_tokenizer"
    as_flags.reset(token)


@pytest.mark.parametrize(
    ("kind", "dtype", "calls", "step"),
    [
        ("base", "float32", 3, "token 3 of 18: logits"),
        ("base", "float16", 18, "token 18 of 18: logits"),
        ("prompted", "bfloat16", 1, "token 1 of 18: logits"),
        ("diffusion", "float32", 3, "step 2 of 2: latents"),
        ("diffusion", "float16", 1, "step 1 of 2: latents"),
        ("predict2.5", "float16", 3, "step 2 of 3: latents"),
        ("predict2.5", "bfloat16", 5, "step 3 of 3: latents"),
    ],
)
def test_the_step_is_named(
    kind: str, dtype: str, calls: int, step: str, load: Load, clip: Path
) -> None:
    world, options = load(kind, dtype=dtype), KINDS[kind].options
    options = {name: value for name, value in options.items() if name != "preview_every"}
    overflowing(world.parts.transformer.module, calls)
    with pytest.raises(NonFiniteError, match=f"{step} .* in {dtype}") as caught:
        world.generate(clip, **options)
    assert caught.value.exit_code == 1
    report = caught.value.report
    assert report["error"] == str(caught.value)
    assert report["model"] == KINDS[kind].name
    assert json.loads(json.dumps(report)) == report


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_steps_are_checked_without_waiting() -> None:
    """But for the device's clock, which each step waits for."""
    device = torch.device("cuda")

    def sampler() -> Steps:
        x = torch.ones(1, 16, 24, 88, 160, device=device)
        for step in range(4):
            x = x / (step != 2)
            yield Stepped(x, x)
        return x

    steps = report(sampler(), Recorder(device), torch.float16, 4, 0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(NonFiniteError, match=r"step 3 of 4: latents .*float16"):
            finish(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_and_decoders(kind: str, load: Load, clip: Path) -> None:
    """What the video tokenizer and the text encoder give."""
    options = KINDS[kind].options
    tokenizer = "decoder_tokenizer" if kind == "prompted" else "tokenizer"
    for part, method, message in (
        ("tokenizer", "encode_piece", "encode: latents"),
        (tokenizer, "decode_piece", "decode: frames"),
        ("text", "encode", "text: embeddings"),
    ):
        world = load(kind)
        if part == "text" and kind == "base":
            continue
        module = world.parts.loaded[part]
        module = module._part.module if part == "text" else module.module
        compute = getattr(module, method)
        broken = lambda *inputs, compute=compute: compute(*inputs) / 0  # noqa: E731
        module.__dict__[method] = broken
        with pytest.raises(NonFiniteError, match=f"^{message} .* float32") as caught:
            world.generate(clip, **{**options, **({"prompt": part} if part == "text" else {})})
        assert caught.value.report["error"].startswith(message)


def test_the_rest_of_a_batch_is_made(load: Load, clip: Path) -> None:
    """Of three in step, one that overflows in its logits, and one in its frames."""
    world = load("base", batch_size=3)
    inputs, each = [clip, moving(9), clip], [{"seed": seed} for seed in (4, 5, 6)]
    alone = [world.generate(one, **own).frames for one, own in zip(inputs, each, strict=True)]
    model = world.parts.transformer.module
    compute, calls = model.forward, iter(range(1000))
    # calls go from clip to clip
    model.forward = lambda *x, **y: compute(*x, **y) * (torch.inf if next(calls) == 13 else 1)
    videos: dict[int, worldline.Video] = {}
    with pytest.raises(worldline.Error, match=r"1 of 3 inputs failed.*token 5 of 18") as caught:
        collect(world.stream_batch(inputs, each), videos)
    assert {n: type(error) for n, error in caught.value.failures.items()} == {1: NonFiniteError}
    assert [*videos] == [0, 2]
    assert all(np.array_equal(videos[number].frames, alone[number]) for number in videos)
    tokenizer = world.parts.tokenizer.module
    decode, pieces = tokenizer.decode_piece, iter(range(1000))
    broken = lambda *x: decode(*x) * (torch.nan if next(pieces) == 4 else 1)  # noqa: E731
    tokenizer.__dict__["decode_piece"] = broken
    videos = {}
    with pytest.raises(worldline.Error, match=r"1 of 3 inputs failed.*frames"):
        collect(world.stream_batch(inputs, each), videos)
    assert len(videos) == 2
    assert all(np.array_equal(videos[number].frames, alone[number]) for number in videos)


def test_a_prompt_that_cannot_be_rewritten_is_its_own_failure(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(checks: Checks, request: Any, clip: Any) -> Generator[Step, None, Any]:
        yield Step("upsample", 0, 1)
        if request.seed == 5:
            raise worldline.Error("wrote nothing")
        return request

    world, videos = load("base", batch_size=2), dict[int, worldline.Video]()
    monkeypatch.setattr(Checks, "before", before)
    with pytest.raises(worldline.Error, match=r"1 of 2 inputs failed.*wrote nothing") as caught:
        collect(world.stream_batch([moving(9)] * 2, [{"seed": 5}, {"seed": 6}]), videos)
    assert [[*caught.value.failures], [*videos]] == [[0], [1]]


def test_prompts_and_inputs_of_a_batch(load: Load) -> None:
    """The one that overflows is named, not the first."""
    world = load("prompted", batch_size=4)
    assert world.parts.text is not None
    encoder, tokenizer = world.parts.text._part.module, world.parts.tokenizer.module
    embed, encode = encoder.encode, tokenizer.encode_piece
    encoder.__dict__["encode"] = lambda words: embed(words) / ("snow" not in words)
    inputs = [
        moving(9),
        moving(9),
        moving(9)[::-1].copy(),
        moving(9) * 0 + 128,
    ]  # the last is dark
    each = [{"prompt": prompt} for prompt in ("ball", "snow", "ball", "rain")]
    tokenizer.__dict__["encode_piece"] = lambda video, *x: encode(video, *x) / (video.max() > 0.1)
    videos: dict[int, worldline.Video] = {}
    with pytest.raises(worldline.Error, match="2 of 4 inputs failed") as caught:
        collect(world.stream_batch(inputs, each), videos)
    errors = {number: str(error)[:14] for number, error in caught.value.failures.items()}
    assert errors == {1: "text: embeddin", 3: "encode: latent"}
    assert [*videos] == [0, 2]


def test_tokenizing_goes_on(
    clip: Path, image: Path, tmp_path: Path, small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding, decoding and both of several files; one overflows."""
    folder, words = small_world / TOKENIZER, ["--output_dir", tmp_path]
    encode = run_words(["tokenize", "encode", clip, image, "--tokenizer_dir", folder, *words])
    assert encode.exit_code == 0, encode.stderr
    stored = [tmp_path / f"{path.stem}.safetensors" for path in (clip, image)]
    pattern = ["--video_pattern", clip, "--checkpoint", folder]
    for method, command in (
        ("encode_piece", ["encode", clip, image, "--tokenizer_dir", folder, *words]),
        ("decode_piece", ["decode", *stored, "--tokenizer_dir", folder, *words]),
        ("decode_piece", ["reconstruct", *pattern, *words]),
        ("encode_piece", ["reconstruct", *pattern, *words, "--temporal_window", 9]),
    ):
        with monkeypatch.context() as patch:
            compute, calls = getattr(CosmosTokenizer, method), iter(range(100))

            def first(*x: Any, compute: Any = compute, calls: Any = calls) -> Tensor:
                return compute(*x) * (torch.inf if next(calls) == 0 else 1)

            patch.setattr(CosmosTokenizer, method, first)
            result = run_words(["tokenize", *command])
        assert result.exit_code == 1, command
        assert result.stderr.count("not finite") == 1
        assert ("1 of 2 inputs failed" in result.stderr) == (command[0] != "reconstruct")


def collect(steps: Any, videos: dict[int, worldline.Video]) -> None:
    """Add the videos of a batch, which may fail at last."""
    for number, step in steps:
        if step.video is not None:
            assert number not in videos
            videos[number] = step.video


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_command_goes_on(
    batch_size: int, own_world: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three clips is not made, alone or in step; its report has the reason."""
    batch, folder = tmp_path / "batch.jsonl", tmp_path / "out"
    batch.write_text(3 * f"{json.dumps({'visual_input': str(clip)})}\n")
    forward, prompts = ARTransformer.forward, 0

    def overflow(model: Any, tokens: Tensor, *others: Any, **named: Any) -> Tensor:
        nonlocal prompts
        prompts += tokens.shape[1] > 1  # the second clip's is read second
        return forward(model, tokens, *others, **named) * (torch.inf if prompts == 2 else 1)

    monkeypatch.setattr(ARTransformer, "forward", overflow)
    words = ["--batch_input_path", batch, "--batch_size", batch_size, "--checkpoint_dir", own_world]
    words += ["--video_save_folder", folder, "--input_type", "video", *WITHOUT_PARTS]
    result = run_words(["autoregressive", "base", *words])
    assert result.exit_code == 1
    assert "1 of 3 inputs failed" in result.stderr
    assert result.stderr.count("token 1 of 18: logits are not finite") == 1
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["0.mp4", "2.mp4"]
    report = json.loads((folder / "1.json").read_text())
    assert report["error"].startswith("token 1 of 18")
    again = run_words(["autoregressive", "base", *words, "--resume"])
    assert again.exit_code == 0, again.stderr
    assert "error" not in json.loads((folder / "1.json").read_text())
