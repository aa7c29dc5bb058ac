"""Prompt upsamplers with made-up weights: layouts, order of rows, pictures, answers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, MistralForCausalLM

from worldline.errors import CheckpointError, Error, NonFiniteError
from worldline.guards import _streamed_bytes
from worldline.text import upsampler as upsamplers
from worldline.text.upsampler import (
    MEAN,
    STD,
    Upsampler,
    _in_halves,
    clean,
    released_config,
    shrunk,
)
from worldline.weights.checkpoint import open_checkpoint

from ..tiny_guards import (
    CAPTION,
    HEAD,
    LONG,
    add_upsampler,
    image_network,
    save_released,
    text_network,
    write_tokenizer,
)

FRAME = np.random.RandomState(0).randint(0, 256, (40, 56, 3), np.uint8)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of released files are small here."""
    configs = [text_network().config, image_network().config]
    monkeypatch.setattr(upsamplers, "released_config", configs.__getitem__)


def load(folder: Path, *, describes: bool) -> Upsampler:
    return Upsampler(folder, [], describes, torch.device("cpu"))


@pytest.mark.parametrize("released", [True, False])
def test_a_long_prompt(released: bool, tmp_path: Path) -> None:
    upsampler = load(add_upsampler(tmp_path, describes=False, released=released), describes=False)
    for prompt in ("a kitten", "a much longer prompt of more words"):
        assert upsampler.write(prompt, None) == LONG


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("shape", [(40, 56), (16, 16), (1100, 40)])
def test_a_picture_described(released: bool, shape: tuple[int, int], tmp_path: Path) -> None:
    upsampler = load(add_upsampler(tmp_path, describes=True, released=released), describes=True)
    assert upsampler.write(None, np.zeros((*shape, 3), np.uint8)) == CAPTION


@pytest.mark.parametrize("describes", [False, True])
def test_both_layouts_are_one_network(describes: bool, tmp_path: Path) -> None:
    """With weights at random, so that every row and every angle counts."""
    write_tokenizer(tmp_path / "a", "x y z")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    network = image_network() if describes else text_network()
    network.save_pretrained(tmp_path / "a")
    save_released(network, tmp_path / "b")
    first, second = (load(tmp_path / name, describes=describes) for name in "ab")
    ids = torch.tensor([[2, 4, 4, 5, 4, 4, 6, 3]])
    seen = {}
    if describes:
        pixels = torch.randn(1, 3, 32, 32)
        seen = {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}
    with torch.inference_mode():
        one, two = (each.part.module(input_ids=ids, **seen).logits for each in (first, second))
    assert torch.equal(one, two)
    assert one.std() > 0


def test_pixtral_as_it_is_published(tmp_path: Path) -> None:
    """The repository was saved by an early transformers, whose modules had other names."""
    write_tokenizer(tmp_path / "new", "x y z")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    network = image_network()
    network.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for name, tensor in network.state_dict().items():
        (new,) = (prefix for prefix in names if name.startswith(prefix))
        tensors[names[new] + name.removeprefix(new)] = tensor
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    first, second = (load(tmp_path / name, describes=True) for name in ("new", "old"))
    for one, two in zip(
        first.part.module.parameters(), second.part.module.parameters(), strict=True
    ):
        assert torch.equal(one, two)


def test_rows_in_halves_turn_as_neighbours_do() -> None:
    """Scores of queries and keys are those of the released rotation of neighbouring numbers."""
    torch.manual_seed(0)
    width, heads, length = 24, 2, 7
    query, key = (torch.randn(heads * HEAD, width).double() for _ in range(2))
    x = torch.randn(length, width).double()
    frequencies = 100.0 ** -(torch.arange(HEAD // 2) * 2 / HEAD)
    angles = torch.outer(torch.arange(length), frequencies).double()

    def neighbours(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(length, heads, HEAD // 2, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        a, b = (x @ _in_halves(weight, HEAD).T).view(length, heads, HEAD).chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    scores = [torch.einsum("qhd,khd->hqk", turn(query), turn(key)) for turn in (neighbours, halves)]
    torch.testing.assert_close(*scores)


def test_a_seed_gives_the_same_words(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "p q r s t u v w x y z")
    save_released(text_network(), tmp_path)
    upsampler = load(tmp_path, describes=False)
    upsampler.longest = 32
    before = torch.random.get_rng_state()
    drawn = [upsampler._answer("[INST]x[/INST]", seed) for seed in (1, 1, 2, 3, 4, 5)]
    assert drawn[0] == drawn[1]
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("describes", [False, True])
def test_streamed_where_there_is_no_room(
    describes: bool, released: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words, and as much on the device as its files let expect; else it moves whole."""
    folder = add_upsampler(tmp_path, describes=describes, released=released)
    upsampler = load(folder, describes=describes)
    part, inputs = upsampler.part, (None, FRAME) if describes else ("a kitten", None)
    part.offload = True  # as on a GPU
    answer, calls = upsampler.write(*inputs), []
    assert not part.streamed
    whole = part.visiting_nbytes
    assert part.blocks is not None
    for layer in part.module.get_submodule(part.blocks.blocks):
        layer.register_forward_hook(lambda layer, *_: calls.append(weights_of(layer)))
    monkeypatch.setattr(part, "_has_room", lambda: False)
    assert upsampler.write(*inputs) == answer
    assert part.streamed
    layers = len(part.module.get_submodule(part.blocks.blocks))  # type: ignore[arg-type]
    assert len(set(calls)) == min(2, layers)
    layer = part.blocks.split(part.module)[0].values()
    assert part.visiting_nbytes == whole + (2 - layers) * sum(weight.nbytes for weight in layer)
    [file] = [path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors")]
    planned = _streamed_bytes({file: file.stat().st_size})
    stored = sum(tensor.nbytes for tensor in open_checkpoint(file).tensors.values())
    assert planned / stored == pytest.approx(part.visiting_nbytes / whole, rel=1e-3)


def weights_of(layer: torch.nn.Module) -> int:
    """Where the first matrix of a layer lies."""
    return next(layer.parameters()).data_ptr()


def test_what_the_picture_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upsampler = load(add_upsampler(tmp_path, describes=True), describes=True)
    asked: list[str] = []
    looked_at: list[torch.Tensor] = []

    def answer(question: str, _: int, **pixels: torch.Tensor) -> str:
        asked.append(question)
        looked_at.append(pixels["pixel_values"])
        return "a"

    monkeypatch.setattr(upsampler, "_answer", answer)
    upsampler.write(None, FRAME)
    rows, columns = math.ceil(40 / 16), math.ceil(56 / 16)
    assert asked[0].count("[IMG]") == rows * columns
    assert asked[0].count("[IMG_BREAK]") == rows - 1
    assert asked[0].startswith("[INST]" + "[IMG]" * columns + "[IMG_BREAK]")
    assert "[IMG][IMG_END]\n" in asked[0]
    assert looked_at[0].shape == (1, 3, rows * 16, columns * 16)
    upsampler.write(None, np.full((16, 16, 3), 255, np.uint8))
    white = ((1 - MEAN) / STD).view(3, 1, 1)
    torch.testing.assert_close(looked_at[1], white.expand(1, 3, 16, 16).to(looked_at[1]))


def test_no_room_and_no_answer(tmp_path: Path) -> None:
    upsampler = load(add_upsampler(tmp_path, describes=False), describes=False)
    with pytest.raises(Error, match="has room for 1023; disable_prompt_upsampler"):
        upsampler.write("word " * 1100, None)
    silent = load(add_upsampler(tmp_path, describes=False, answer="- *"), describes=False)
    with pytest.raises(Error, match="wrote nothing"):
        silent.write("a kitten", None)


@pytest.mark.parametrize("describes", [False, True])
def test_logits_that_overflow(describes: bool, tmp_path: Path) -> None:
    upsampler = load(add_upsampler(tmp_path, describes=describes), describes=describes)
    weight = upsampler.part.module.get_output_embeddings().weight
    weight.data.fill_(torch.finfo(weight.dtype).max)
    with pytest.raises(NonFiniteError, match="upsample: logits"):
        upsampler.write(None if describes else "a kitten", FRAME)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model.pt", "holds no model.pt or safetensors"),
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat template"),
    ],
)
def test_what_is_missing_is_named(lost: str, named: str, tmp_path: Path) -> None:
    folder = add_upsampler(tmp_path, describes=False, released=True)
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=named):
        load(folder, describes=False)


def test_another_model(tmp_path: Path) -> None:
    folder = add_upsampler(tmp_path, describes=False, released=True)
    with pytest.raises(CheckpointError, match=r"missing: .*vision_encoder"):
        load(folder, describes=True)
    state = torch.load(folder / "model.pt")
    norm = state["model"].pop("model.norm.weight")
    torch.save(state, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        load(folder, describes=False)
    state["model"]["norm.weight"] = norm
    torch.save(state, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"1 of another set: norm\.weight"):
        load(folder, describes=False)


def test_parameters_of_the_released_networks() -> None:
    kinds = (MistralForCausalLM, 12_247_782_400), (LlavaForConditionalGeneration, 12_682_739_712)
    for describes, (kind, parameters) in enumerate(kinds):
        with torch.device("meta"):
            network = kind(released_config(bool(describes)))
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_clean_and_shrunk() -> None:
    assert clean("Caption: - **Scene** A dog,\n runs. ") == "A dog, runs."
    assert clean("- - twice") == "twice"
    assert shrunk(1024, 3) == (1024, 3)
    assert shrunk(2048, 3) == (1024, 2)
