"""The scripts that train the bundled world, at the smallest size: they run, resume and export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import worldline
from tests.states import read_state
from tiny import sizes
from tiny.__main__ import main
from tiny.autoregressive import sequence_loss
from tiny.clips import as_video, make_clips
from tiny.decoder import DECODER, Decoding, cut_windows, long_shape
from tiny.denoiser import rounded_to
from tiny.diffusion import TEXT_FOLDER, WORLD, Denoising
from tiny.encoders import embed_captions, export_t5, new_t5
from tiny.export import draw_weights
from tiny.tokenizer import export_tokenizer
from worldline import locate
from worldline.errors import CheckpointError
from worldline.families.autoregressive import decoder
from worldline.families.autoregressive.model import ARTransformer, make_positions
from worldline.families.autoregressive.weights import read_config
from worldline.families.diffusion.model import DiT
from worldline.families.diffusion.weights import open_network
from worldline.sampling.edm import make_sigmas
from worldline.sampling.solvers import finish, standard_noise
from worldline.sampling.tokens import split_windows
from worldline.shapes import LatentShape, VideoShape
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.states import States
from worldline.weights.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LatentShape(5, 2, 3)
    monkeypatch.setattr(sizes, "SHAPE", VideoShape(33, 32, 48))
    monkeypatch.setattr(sizes, "GRID", grid)
    small = replace(sizes.TOKENIZER, channels=4, level_channels=(8, 8, 8))
    monkeypatch.setattr(sizes, "TOKENIZER", small)
    monkeypatch.setattr(
        sizes,
        "AUTOREGRESSIVE",
        replace(sizes.AUTOREGRESSIVE, depth=1, width=32, hidden=32, grid=grid),
    )
    small = replace(sizes.CONTINUOUS, channels=4, level_channels=(8, 8, 8))
    monkeypatch.setattr(sizes, "CONTINUOUS", small)
    small_dit: dict[str, Any] = {"depth": 1, "width": 32, "num_heads": 1, "hidden": 32}
    small_dit |= {"lora_rank": 2, "context_width": 16}
    monkeypatch.setattr(sizes, "DIFFUSION", replace(sizes.DIFFUSION, **small_dit, max_grid=grid))
    monkeypatch.setattr(sizes, "DECODER", replace(sizes.DECODER, **small_dit))
    text = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
    monkeypatch.setattr(sizes, "TEXT", text)
    small_world = replace(
        sizes.VIDEO2WORLD, depth=1, width=32, hidden=32, grid=grid, context_width=16
    )
    monkeypatch.setattr(sizes, "VIDEO2WORLD", small_world)


def draw_frames(count: int, shape: VideoShape, *, first: int = 0) -> Tensor:
    """Clips as training draws them, uint8 (B, T, H, W, 3)."""
    seeds = range(first, first + count)
    return make_clips(seeds, shape.frames, shape.height, shape.width).frames


def run(*words: object) -> None:
    result = CliRunner().invoke(main, [*map(str, words), "--device", "cpu"])
    if result.exception is not None:
        raise result.exception


def test_tokenizer_then_transformer(tmp_path: Path) -> None:
    common = ["--batch", 2, "--clips", 3]
    run("tokenizer", "--folder", tmp_path / "tok", "--steps", 2, *common)
    run("tokenizer", "--folder", tmp_path / "tok", "--steps", 3, *common)  # goes on
    assert json.loads((tmp_path / "tok" / "result.json").read_text())["steps"] == 3
    export = tmp_path / "tok" / "export"
    assert open_tokenizer(export).config.levels == sizes.TOKENIZER.levels
    words = ["--tokenizer", export, "--steps", 2, *common]
    run("autoregressive", "--folder", tmp_path / "ar", *words)
    settings = json.loads((tmp_path / "ar" / "export" / "config.json").read_text())
    assert settings["video_latent_shape"] == [5, 2, 3]
    # another run may begin with these weights
    run(
        "autoregressive",
        "--folder",
        tmp_path / "b",
        "--weights",
        tmp_path / "ar" / "export",
        *words,
    )


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a continuous tokenizer, trained for three steps in two runs."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "SHAPE", VideoShape(33, 32, 48))
        small = replace(sizes.CONTINUOUS, channels=4, level_channels=(8, 8, 8))
        patch.setattr(sizes, "CONTINUOUS", small)
        for steps in (2, 3):
            words = ["--kind", "continuous", "--steps", steps, "--batch", 2, "--clips", 3]
            run("tokenizer", "--folder", folder, *words)
    return folder / "export"


def test_the_statistics_are_those_of_the_exported_tokenizer(latents: Path) -> None:
    statistics = open_tokenizer(latents).statistics
    assert statistics is not None
    assert statistics.frames == 16  # as many as in released files
    model = open_tokenizer(latents).read("cpu", torch.float32)
    clips = draw_frames(3, sizes.SHAPE)
    normal = statistics.normalise(model.encode(as_video(clips)))
    torch.testing.assert_close(normal.mean((0, 3, 4)), torch.zeros(16, 5), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        normal.std((0, 3, 4), correction=0), torch.ones(16, 5), atol=1e-3, rtol=0
    )


def diffusion(folder: Path, latents: Path, steps: int, *more: object) -> dict[str, Tensor]:
    words = ["--steps", steps, "--batch", 4, "--clips", 2, "--negative_prompt", "nothing to see"]
    run("diffusion", "--folder", folder, "--tokenizer", latents, *words, *more)
    return read_state(folder)


def test_a_cut_diffusion_run_goes_on_bit_for_bit(tmp_path: Path, latents: Path) -> None:
    whole = diffusion(tmp_path / "whole", latents, 3)
    diffusion(tmp_path / "cut", latents, 3, "--seconds", 0)
    assert States(tmp_path / "cut").steps() == [1]
    cut = diffusion(tmp_path / "cut", latents, 3)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_world_and_its_text_encoder_can_be_opened(tmp_path: Path, latents: Path) -> None:
    diffusion(tmp_path, latents, 2)
    world = tmp_path / "export" / WORLD
    settings = json.loads((world / "config.json").read_text())
    assert open_network(world, settings).config == sizes.DIFFUSION
    assert settings["text2world"] is True
    text = T5Files.open(tmp_path / "export" / TEXT_FOLDER).read("cpu", torch.float32)
    rows = text.encode(["A red ball falls."])
    assert rows.shape == (1, sizes.TEXT_LENGTH, sizes.TEXT["d_model"])
    # another run may begin with these weights
    words = ["--tokenizer", latents, "--steps", 1, "--batch", 1, "--clips", 1]
    run("diffusion", "--folder", tmp_path / "b", "--weights", tmp_path / "export", *words)


def test_the_text_encoder_learns_with_the_transformer() -> None:
    torch.manual_seed(0)
    model = Denoising(DiT(sizes.DIFFUSION), new_t5(sizes.TEXT, max_length=16))
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = (torch.randn(1, 16, 5, 4, 6), torch.randn(2, 1, 16, 5, 4, 6))
    words = model.text.tokenize(["a red ball"])
    noise, known = torch.tensor([1.0]), torch.tensor([1])
    rounded_to(torch.bfloat16, model, *given, *words, noise, known).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text encoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text")
    sizes_of_text = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
    export_t5(new_t5(sizes_of_text), folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a discrete tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    model = CosmosTokenizer(replace(sizes.TOKENIZER, channels=4, level_channels=(8, 8, 8)))
    draw_weights(model)
    export_tokenizer(model, folder)
    return folder


def test_a_transformer_of_clips_and_captions(tmp_path: Path, tokens: Path, text: Path) -> None:
    words = ["--tokenizer", tokens, "--text", text, "--batch", 2, "--clips", 2]
    run("autoregressive", "--folder", tmp_path / "whole", "--steps", 2, *words)
    export = tmp_path / "whole" / "export"
    settings = json.loads((export / "config.json").read_text())
    source = open_checkpoint(export / "model.safetensors")
    assert read_config(source, settings) == sizes.VIDEO2WORLD
    run("autoregressive", "--folder", tmp_path / "cut", "--steps", 2, "--seconds", 0, *words)
    run("autoregressive", "--folder", tmp_path / "cut", "--steps", 2, *words)
    whole, cut = (
        load_file(tmp_path / name / "export/model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_captions_together_are_embedded_as_alone(text: Path) -> None:
    encoder = T5Files.open(text).read("cpu", torch.float32)
    captions = ["A red ball falls.", "", "A long yellow box slides to the left."]
    torch.testing.assert_close(
        embed_captions(encoder, captions), encoder.encode(captions), rtol=1e-5, atol=1e-6
    )


def test_the_first_latent_frame_and_the_begin_token_have_no_loss() -> None:
    torch.manual_seed(0)
    config = sizes.VIDEO2WORLD
    model = ARTransformer(config)
    draw_weights(model)
    positions = make_positions(config, "cpu", torch.float32)
    tokens = torch.randint(config.vocabulary, (1, config.grid.tokens))
    context = torch.randn(1, 4, 16)
    loss = sequence_loss(model, positions, tokens, context)
    # the same by hand: of every token behind the first frame
    begun = torch.cat([torch.tensor([[config.begin_token]]), tokens], dim=1)
    logits = model(begun, positions, context=model.encode_context(context))[0].log_softmax(-1)
    first = config.grid.tokens_per_frame
    expected = -logits[torch.arange(first, config.grid.tokens), tokens[0, first:]].mean()
    torch.testing.assert_close(loss, expected)


def test_windows_pair_tokens_with_the_latents_of_their_frames(tokens: Path, latents: Path) -> None:
    coarse = open_tokenizer(tokens).read("cpu", torch.float32)
    fine = open_tokenizer(latents).read("cpu", torch.float32)
    statistics = open_tokenizer(latents).statistics
    assert statistics is not None
    clips = draw_frames(2, long_shape())
    draws = torch.Generator().manual_seed(1)
    z, ids = cut_windows(coarse, fine, statistics, as_video(clips), draws)
    later = int(torch.randint(1, 7, (), generator=torch.Generator().manual_seed(1)))
    video = as_video(clips)
    whole = coarse.encode_tokens(video)
    assert torch.equal(ids[0].long(), whole[0, :8])
    assert torch.equal(ids[4].long(), whole[1, later : later + 8])
    assert torch.equal(ids[2].long(), whole[0, [0, 1, 2, 3, 4, 3, 2, 1]])
    expected = 0.5 * statistics.normalise(fine.encode(video[:, :, 8 * later : 8 * later + 57]))
    torch.testing.assert_close(z[1::3].float(), expected, atol=1e-2, rtol=1e-2)  # kept in bf16
    assert torch.equal(z[2], z[0][:, [0, 1, 2, 3, 4, 3, 2, 1]])


def test_the_decoder_can_be_opened(tmp_path: Path, tokens: Path, latents: Path, text: Path) -> None:
    words = ["--tokenizer", tokens, "--latents", latents, "--text", text]
    run("decoder", "--folder", tmp_path, "--steps", 2, "--batch", 2, "--clips", 1, *words)
    folder = tmp_path / "export" / DECODER
    settings = json.loads((folder / "config.json").read_text())
    assert open_network(folder, settings).config == sizes.DECODER
    general = load_file(folder / "aux_vars.safetensors")["context"]
    assert general.shape == (1, 128, 16)
    more = ["--weights", tmp_path / "export", "--steps", 1, "--batch", 1, "--clips", 1]
    run("decoder", "--folder", tmp_path / "b", *more, *words)


def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tokenizer", "--folder", str(tmp_path), "--graph", "--device", "cpu"])
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shipped(
    tmp_path: Path,
    tokens: Path,
    latents: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What the training commands export, laid out as it ships with the package."""
    few = ("--steps", 1, "--batch", 1, "--clips", 1, "--tokenizer", tokens)
    run("decoder", "--folder", tmp_path / "decoder", *few, "--latents", latents, "--text", text)
    run("autoregressive", "--folder", tmp_path / "base", *few)
    run("autoregressive", "--folder", tmp_path / "prompted", *few, "--text", text)
    root = tmp_path / "bundled"
    shutil.copytree(tmp_path / "decoder" / "export", root)
    for source, name in (
        (tmp_path / "base" / "export", "Cosmos-Predict1-4B"),
        (tmp_path / "prompted" / "export", "Cosmos-Predict1-5B-Video2World"),
        (tokens, "Cosmos-Tokenize1-DV8x16x16-720p"),
        (latents, "Cosmos-Tokenize1-CV8x8x8-720p"),
        (text, "google-t5/t5-11b"),
    ):
        shutil.copytree(source, root / name)
    monkeypatch.setattr(locate, "BUNDLED", root)
    return root


@pytest.mark.parametrize("bundled", [True, False])
def test_exported_worlds_decode_by_diffusion(shipped: Path, bundled: bool) -> None:
    clip = draw_frames(1, sizes.SHAPE)[0].numpy()
    released = {"checkpoint_dir": shipped, "device": "cpu", "disable_guardrail": True}
    for name, options in (
        ("Cosmos-Predict1-4B", {}),
        ("Cosmos-Predict1-5B-Video2World", {"prompt": "A red ball falls."}),
    ):
        if bundled:
            world = worldline.load(f"tiny-{name}", device="cpu")
        else:
            world = worldline.load(name, **released)
        video = world.generate(clip[:9], seed=3, **options)
        assert video.frames.shape == (33, 32, 48, 3)
        settings = video.report["diffusion_decoder"]
        assert settings["rotary_precision"] == sizes.ROTARY_PRECISION
        plain = worldline.load(name, **released, disable_diffusion_decoder=True)
        coarse = plain.generate(clip[:9], seed=3, **options)
        assert coarse.report["diffusion_decoder"] is None
        assert coarse.frames.shape == video.frames.shape
        assert not np.array_equal(coarse.frames, video.frames)


def test_a_shipped_decoder_is_no_world(shipped: Path) -> None:
    assert locate.bundled_names() == [
        "tiny-Cosmos-Predict1-4B",
        "tiny-Cosmos-Predict1-5B-Video2World",
    ]
    for part in (DECODER, "Cosmos-Tokenize1-DV8x16x16-720p", "google-t5"):
        with pytest.raises(CheckpointError, match="no bundled model tiny-"):
            worldline.load(f"tiny-{part}")
    shutil.rmtree(shipped / DECODER)
    world = worldline.load("tiny-Cosmos-Predict1-4B", device="cpu")
    clip = draw_frames(1, sizes.SHAPE)[0].numpy()
    assert world.generate(clip[:9]).report["diffusion_decoder"] is None


def test_the_decoder_is_trained_as_it_is_used(
    tokens: Path, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, positions, ids and noise levels are those of the pipeline."""
    coarse = open_tokenizer(tokens).read("cpu", torch.float32)
    fine = open_tokenizer(latents).read("cpu", torch.float32)
    statistics = open_tokenizer(latents).statistics
    assert statistics is not None
    clips = draw_frames(1, long_shape())
    draws = torch.Generator().manual_seed(2)
    z, ids = cut_windows(coarse, fine, statistics, as_video(clips), draws)
    # a short clip: the pipeline cuts its tokens as training does
    tokens = coarse.encode_tokens(as_video(clips))[:, : sizes.GRID.frames]
    [short] = split_windows(tokens, decoder.DECODER_WINDOW, decoder.OVERLAP)
    assert torch.equal(ids[2:3].long(), short.long())

    torch.manual_seed(0)
    model = Decoding(DiT(sizes.DECODER))
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    seen: list[tuple[Tensor, ...]] = []
    forward = DiT.forward

    def spy(
        self: DiT, x: Tensor, times: Tensor, context: Any, at: Any, *, ids: Tensor, **shared: Any
    ) -> Tensor:
        seen.append((times, context[0][0], at.rotation.cos, at.rotation.sin, ids))
        return forward(self, x, times, context, at, ids=ids, **shared)

    monkeypatch.setattr(DiT, "forward", spy)
    context = torch.randn(1, 4, 16)
    network = decoder.DecoderNetwork(DiT, sizes.DECODER, num_steps=2)
    finish(
        network.denoise_window(model.transformer, short, context, standard_noise(0, z[:1].shape))
    )
    sigma = make_sigmas("edm_euler", 2, sigma_min=decoder.SIGMA_MIN)[0]
    # both branches in training's terms: the clip, and one with neither prompt nor tokens
    texts, inputs = torch.cat([context, context * 0]), torch.cat([short, short * 0])
    clean = torch.cat([z[2:3], z[2:3]]).float()
    model(clean, torch.randn_like(clean), inputs, texts, sigma.float().expand(2))
    used, trained = seen[0], seen[-1]
    torch.testing.assert_close(used[0], trained[0], atol=0, rtol=2**-8)  # rounded to bf16
    for one, other in zip(used[1:], trained[1:], strict=True):
        assert torch.equal(one, other)


def test_clips_without_a_prompt_have_no_tokens(
    tmp_path: Path, tokens: Path, latents: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the branch of the guidance that the decoder's pipeline calls without prompt."""
    seen: list[tuple[Tensor, Tensor]] = []
    forward = Decoding.forward

    def spy(self: Decoding, *given: Tensor) -> Tensor:
        seen.append((given[2], given[3]))
        return forward(self, *given)

    monkeypatch.setattr(Decoding, "forward", spy)
    words = ["--tokenizer", tokens, "--latents", latents, "--text", text]
    run("decoder", "--folder", tmp_path, "--steps", 1, "--batch", 64, "--clips", 1, *words)
    ids, context = seen[0]
    inputs = ids.flatten(1).any(1)
    assert 0 < inputs.sum() < len(inputs)
    assert torch.equal(inputs, context.flatten(1).any(1))
