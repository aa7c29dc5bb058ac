"""The scripts that train the bundled world of flows, at the smallest size."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import worldline
from tests.states import read_state
from tiny import reconstruction, sizes
from tiny.clips import as_video
from tiny.denoiser import rounded_to, train_captioned
from tiny.encoders import new_reason1
from tiny.export import draw_weights
from tiny.flow import TEXT_FOLDER, WORLD, Flowing
from tiny.motion import FPS
from tiny.reconstruction import DEVIATION, KL, cut, reconstruction_loss
from tiny.run import Run
from tiny.scenes import draw_scenes
from tiny.wan import compile_between_convolutions
from worldline import locate
from worldline.families.predict2_5.model import FlowDiT
from worldline.families.predict2_5.weights import open_network
from worldline.sampling.flow import make_schedule
from worldline.shapes import VideoShape
from worldline.text.reason1 import Reason1Files
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.tokenizers.wan.weights import open_wan
from worldline.train.loop import Objective
from worldline.train.states import States

from .test_recipes import draw_frames, run

TINY = f"tiny-{WORLD}"


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "SHAPE", VideoShape(9, 32, 48))
        patch.setattr(sizes, "WAN_PIECE", VideoShape(5, 16, 24))
        small = replace(sizes.WAN, channels=4, multipliers=(1, 1, 2, 2))
        patch.setattr(sizes, "WAN", small)
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        patch.setattr(sizes, "REASON1", {**sizes.REASON1, **text})
        transformer: dict[str, Any] = {"depth": 1, "width": 32, "num_heads": 1, "hidden": 32}
        transformer |= {"lora_rank": 2, "context_width": 16, "feature_width": 32}
        patch.setattr(sizes, "FLOW", replace(sizes.FLOW, **transformer))
        size = {"num_video_frames": 9, "height": 32, "width": 48, "num_steps": 2}
        patch.setattr(sizes, "FLOW_SETTINGS", {**sizes.FLOW_SETTINGS, **size})
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a tokenizer, trained for three steps in two runs."""
    folder = tmp_path_factory.mktemp("wan")
    for steps in (2, 3):
        run("wan", "--folder", folder, "--steps", steps, "--batch", 2, "--clips", 3)
    return folder / "export"


def train(folder: Path, tokenizer: Path, steps: int, *more: object) -> dict[str, Tensor]:
    words = ["--steps", steps, "--batch", 4, "--clips", 2, "--negative_prompt", "nothing to see"]
    run("flow", "--folder", folder, "--tokenizer", tokenizer, *words, *more)
    return read_state(folder)


def test_latents_of_the_exported_tokenizer_are_of_unit_deviation(tokenizer: Path) -> None:
    model = open_wan(tokenizer).read("cpu", torch.float32)
    clips = draw_frames(3, sizes.SHAPE)
    z = model.encode(as_video(clips)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(16), atol=1e-3, rtol=0)


def test_the_exported_variance_is_the_noise_of_training(tokenizer: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tokenizer, torch_dtype=torch.float32)
    clips = draw_frames(1, sizes.SHAPE)
    with torch.no_grad():
        drawn = theirs.encode(as_video(clips)).latent_dist
    torch.testing.assert_close(drawn.std, torch.full_like(drawn.std, DEVIATION), rtol=0.02, atol=0)


def test_pieces_are_of_one_place_and_reach_all_of_a_picture() -> None:
    shape = (2, 5, 6, 7)  # clips, frames, height, width; the colour of a pixel is where it was
    clips = torch.arange(math.prod(shape)).view(*shape, 1).expand(*shape, 3)
    corners = set()
    for seed in range(60):
        piece = cut(clips, VideoShape(3, 4, 6), torch.Generator().manual_seed(seed))
        assert piece.shape == (2, 3, 4, 6, 3)
        first = int(piece[0, 0, 0, 0, 0])
        y, x = divmod(first, 7)
        assert torch.equal(piece, clips[:, :3, y : y + 4, x : x + 6])
        corners.add((y, x))
    assert corners == {(y, x) for y in range(3) for x in range(2)}


def test_where_a_piece_is_cut_is_independent_of_which_clips_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, piece = sizes.SHAPE, sizes.WAN_PIECE
    count = shape.height - piece.height + 1  # as many clips as rows where a piece may begin
    clips = torch.zeros(count, shape.frames, shape.height, shape.width, 3, dtype=torch.uint8)
    clips[..., 0] = torch.arange(count).view(-1, 1, 1, 1)
    clips[..., 1] = torch.arange(shape.height).view(-1, 1)
    drawn: list[tuple[int, int]] = []

    def train(_: Run, __: nn.Module, objective: Objective, ___: object) -> int:
        for step in range(20 * count):
            clip, row, _ = objective.draw(step)[0][0, 0, 0, 0].tolist()
            drawn.append((clip, row))
        return 0

    monkeypatch.setattr(reconstruction, "clip_batches", lambda *_, **__: iter([(clips, [])]))
    monkeypatch.setattr(Run, "train", train)
    run = Run(folder=tmp_path, steps=1, batch=1, clips=count)
    reconstruction.train_reconstruction(run, WanTokenizer(sizes.WAN), KL, piece=piece)
    for ahead in range(count):  # a relation would bring one of these about much more often
        together = sum((clip + ahead) % count == row for clip, row in drawn)
        assert 2 <= together <= 45  # 20 is the mean


def test_a_run_of_the_tokenizer_may_begin_with_weights(tmp_path: Path, tokenizer: Path) -> None:
    few = ("--steps", 1, "--batch", 1, "--clips", 2, "--rate", 1e-12)
    run("wan", "--folder", tmp_path, "--weights", tokenizer, *few)
    before, after = (open_wan(folder) for folder in (tokenizer, tmp_path / "export"))
    assert before.config.widths == after.config.widths
    for name in before.source.tensors:
        assert torch.equal(before.source.read(name), after.source.read(name)), name
    # the statistics are of the encoder, not of what its file held before
    assert after.config.std == pytest.approx(before.config.std, rel=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler's own
def test_compiled_between_convolutions_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch.manual_seed(0)
    model = WanTokenizer(sizes.WAN)
    draw_weights(model)
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    plain = model.reconstruct(video)
    compile_between_convolutions(model)
    torch.testing.assert_close(model.reconstruct(video), plain)


class _Reads(TorchDispatchMode):
    """Refuses to bring numbers to the CPU or from it, which no graph of a GPU can hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.lift_fresh.default,  # of torch.tensor, which has values from the CPU
        ), func
        return func(*args, **(kwargs or {}))


def flowing() -> Flowing:
    torch.manual_seed(0)
    model = Flowing(FlowDiT(sizes.FLOW), new_reason1(sizes.REASON1, max_length=40))
    for parameter in model.transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def batch(model: Flowing, *known: int) -> tuple[Tensor, ...]:
    count = len(known)
    latents, noise = torch.randn(2, count, 16, 3, 4, 6)
    [ids] = model.text.tokenize(["a red ball"] * count)
    return latents, noise, ids, torch.rand(count), torch.tensor(known)


def test_a_step_waits_for_no_number() -> None:
    model = flowing()
    given = batch(model, 0, 1)
    with _Reads():
        rounded_to(torch.bfloat16, model, *given).sum().backward()
    tokenizer = WanTokenizer(sizes.WAN)
    draw_weights(tokenizer)
    tokenizer.channels_last()
    clips, noise = torch.zeros(1, 9, 32, 48, 3, dtype=torch.uint8), torch.zeros(1, 16, 3, 4, 6)
    measured = (tokenizer, KL, clips, noise)
    reconstruction_loss(*measured)  # the statistics of latents are copied once
    with _Reads():
        reconstruction_loss(*measured)[0].backward()


class Drawn(Exception):
    """Ends a recipe once its batches were counted."""


def test_which_clips_are_drawn_and_given_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions with a word come once more; held-out clips, and texts, do not know of it."""
    boxes: list[float] = []
    given: list[int] = []

    def tokenize(captions: list[str]) -> tuple[Tensor, ...]:
        return (torch.tensor([[float("box" in caption)] for caption in captions]),)

    def train(_: Run, __: nn.Module, objective: Objective, ___: object) -> int:
        for step in range(30):
            *_, texts, _, count = objective.draw(step)
            boxes.extend(texts[texts >= 0].tolist())
            given.extend(count.tolist())
        raise Drawn

    monkeypatch.setattr(Run, "train", train)
    run = Run(folder=tmp_path, steps=1, batch=64, clips=40)
    with pytest.raises(Drawn):
        train_captioned(
            run,
            nn.Linear(1, 1),
            lambda video: video[:, :1, :1, :1, :1],
            tokenize,
            (torch.full((1, 1), -1.0),),
            lambda normal: normal,
            lambda folder: None,
            conditioning=(0.75, 0.25),
            often=("box",),
        )
    share = float(tokenize(draw_scenes(range(40)).captions)[0].mean())
    assert sum(boxes) / len(boxes) == pytest.approx(2 * share / (1 + share), abs=0.05)
    assert sum(given) / len(given) == pytest.approx(0.25, abs=0.05)


def test_the_text_encoder_learns_with_the_transformer() -> None:
    model = flowing()
    rounded_to(torch.bfloat16, model, *batch(model, 1)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_cut_run_goes_on_bit_for_bit(tmp_path: Path, tokenizer: Path) -> None:
    whole = train(tmp_path / "whole", tokenizer, 3)
    train(tmp_path / "cut", tokenizer, 3, "--seconds", 0)
    assert States(tmp_path / "cut").steps() == [1]
    cut = train(tmp_path / "cut", tokenizer, 3)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """The export of a world, trained for two steps."""
    folder = tmp_path_factory.mktemp("flow")
    train(folder, tokenizer, 2)
    return folder / "export"


def test_the_world_and_its_text_encoder_can_be_opened(tmp_path: Path, exported: Path) -> None:
    settings = json.loads((exported / WORLD / "config.json").read_text())
    assert open_network(exported / WORLD, settings).config == sizes.FLOW
    text = Reason1Files.open(exported / TEXT_FOLDER).read("cpu", torch.float32)
    rows = text.encode(["A red ball falls."])
    assert rows.shape == (1, sizes.TEXT_LENGTH, sizes.FLOW.feature_width)
    # another run may begin with these weights
    words = ["--weights", exported, "--steps", 1, "--batch", 1, "--clips", 1]
    run("flow", "--folder", tmp_path, "--tokenizer", exported / WORLD / "vae", *words)


@pytest.fixture(params=["bundled", "named"])
def world(
    request: pytest.FixtureRequest, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> worldline.World:
    """The exported world, as it ships with the package or below a checkpoint folder."""
    if request.param == "named":
        return worldline.load(WORLD, checkpoint_dir=exported, device="cpu", disable_guardrail=True)
    monkeypatch.setattr(locate, "BUNDLED", exported)
    return worldline.load(TINY, device="cpu")


def test_the_exported_world_makes_videos(world: worldline.World) -> None:
    clip = draw_frames(1, sizes.SHAPE)[0].numpy()
    for given in (0, 1, 5):
        video = world.generate(
            clip[:given] if given else None, prompt="A red ball falls.", num_input_frames=given
        )
        assert video.frames.shape == (9, 32, 48, 3)
        assert video.fps == FPS
        assert video.report["schedule"] == "shifted"
        assert video.report["evaluations"] == 2


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_a_network_has_the_inputs_of_a_sampler_in_training(
    exported: Path, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First step of a video: noise but for the known frames, the same words, time and places."""
    seen: list[tuple[Any, ...]] = []
    forward = FlowDiT.forward

    def spy(self: FlowDiT, *given: Any, **named: Any) -> Tensor:
        output = forward(self, *given, **named)
        seen.append((*given, named["condition_mask"], output))
        return output

    monkeypatch.setattr(FlowDiT, "forward", spy)
    world = worldline.load(WORLD, checkpoint_dir=exported, device="cpu", disable_guardrail=True)
    clip = draw_frames(1, sizes.SHAPE, first=7)
    input = clip[0, :frames].numpy() if frames else None
    world.generate(
        input, prompt="A star falls.", num_input_frames=frames, guidance=0.0, num_steps=1
    )
    model = Flowing(
        world.parts.transformer.module,
        Reason1Files.open(exported / TEXT_FOLDER).read("cpu", torch.float32),
    )
    coder = open_wan(exported / WORLD / "vae").read("cpu", torch.float32)
    latents = coder.encode(as_video(clip))
    sigma = make_schedule("shifted", 1).sigmas[:1]
    used = seen[0]
    known = torch.tensor([math.ceil(frames / 4)])
    # the sampler's first state is noise alone; training's has the share that is left of the data
    noise = (used[0] - (1 - sigma) * latents) / sigma
    [ids] = model.text.tokenize(["A star falls."])
    with torch.no_grad():
        model(latents, noise, ids, sigma, known)
    for one, other in zip(_flat(used), _flat(seen[1]), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def _flat(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [tensor for part in given for tensor in _flat(part)]


def test_the_tokenizer_travels_with_the_world(exported: Path, tokenizer: Path) -> None:
    for file in tokenizer.iterdir():
        assert (exported / WORLD / "vae" / file.name).read_bytes() == file.read_bytes()


def test_a_world_without_its_tokenizer_is_refused(tmp_path: Path, exported: Path) -> None:
    shutil.copytree(exported, tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / WORLD / "vae")
    with pytest.raises(worldline.Error, match="no tokenizer"):
        worldline.load(WORLD, checkpoint_dir=tmp_path / "all", device="cpu", disable_guardrail=True)
