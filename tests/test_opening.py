"""From a name to opened and loaded parts, for every family: what is found, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import worldline
from tiny.export import draw_weights, stored_tensors
from worldline import locate
from worldline.errors import CheckpointError, InputError
from worldline.families.denoise import read_prompts
from worldline.families.diffusion.request import DiffusionOptions
from worldline.opening import choose_compute, choose_device
from worldline.parallel.mesh import Layout, plan_mesh
from worldline.request import LoadOptions
from worldline.tokenizers.layouts import wan_settings
from worldline.tokenizers.wan.model import WanTokenizer
from worldline.tokenizers.wan.weights import key_map
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.world import fingerprint

from .conftest import MODEL, SMALL_TOKENIZER, SMALL_TRANSFORMER, TOKENIZER
from .families.worlds import PLAIN, checked, load_named, open_named
from .tiny_diffusion import (
    CONTINUOUS,
    DEFAULTS,
    TEXT2WORLD,
    TEXT_ENCODER,
    VIDEO2WORLD,
    config,
    write_tokenizer,
)
from .tiny_predict2_5 import CONFIG, POST
from .tiny_predict2_5 import TOKENIZER as WAN

BY_TOKENIZER = {"disable_diffusion_decoder": True}
FLOW_FOLDER = Path(POST.repository).name


@pytest.fixture
def roots(small_world: Path, tiny_diffusion: Path, tiny_predict2_5: Path) -> dict[str, Path]:
    """Checkpoint folder by family."""
    return {
        "autoregressive": small_world,
        "diffusion": tiny_diffusion,
        "predict2.5": tiny_predict2_5,
    }


def test_log_and_report_name_what_was_done(
    own_world: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = own_world / MODEL / "model.pt"
    source = open_checkpoint(path)
    tensors = {f"_orig_mod.{name}": source.read(name) for name in source.entries}
    torch.save({"ema_model": tensors, "model": {n: t + 1 for n, t in tensors.items()}}, path)
    caplog.set_level(logging.INFO, "worldline")
    world = worldline.load(MODEL, checkpoint_dir=own_world, disable_guardrail=True, **BY_TOKENIZER)
    [stripped, averaged] = world.generate(clip).report["weights"]["transformer"]
    assert "_orig_mod" in stripped
    assert "ema_model." in averaged
    for note in (stripped, averaged):
        assert caplog.messages.count(f"transformer: {note}") == 1


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("family", "folder", "file", "options", "sizes", "tokenizer"),
    [
        (
            *("autoregressive", MODEL, "model.pt", BY_TOKENIZER),
            *(SMALL_TRANSFORMER, SMALL_TOKENIZER.vocabulary),
        ),
        ("diffusion", TEXT2WORLD, "model.pt", {}, config(condition_mask=False), None),
        ("predict2.5", FLOW_FOLDER, POST.file, {}, CONFIG, None),
    ],
)
def test_by_name_by_path_and_by_file(
    family: str,
    folder: str,
    file: str,
    options: dict[str, Any],
    sizes: Any,
    tokenizer: int | None,
    roots: dict[str, Path],
) -> None:
    root = roots[family]
    for name in (folder, root / folder, root / folder / file):
        opened = open_named(name, root, **options)
        assert opened.family.name == family
        assert opened.folder == (root / folder / file).parent
        assert opened["transformer"].path == root / folder / file
        assert opened["transformer"].config == sizes
        assert not opened.place.bundled
        if tokenizer is not None:
            assert opened["tokenizer"].config.vocabulary == tokenizer
    # other parts are found around the model, wherever --checkpoint_dir points
    assert "tokenizer" in open_named(root / folder / file, "nowhere", **options).parts


def test_a_named_file_is_opened(own_world: Path) -> None:
    folder = own_world / MODEL
    source = open_checkpoint(folder / "model.pt")
    tensors = {name: source.read(name).clone() for name in source.tensors}
    tensors["model.norm.weight"] += 1
    for name in ("model.safetensors", "mine.pt"):
        save(tensors, folder / name)
    for named in (
        *(folder / name for name in ("model.pt", "model.safetensors")),
        f"{MODEL}/mine.pt",
    ):
        opened = open_named(named, own_world, **BY_TOKENIZER)
        [file, settings] = opened["transformer"].files
        assert file == folder / Path(named).name
        assert settings == folder / "config.json"  # of the folder counts
        assert opened["transformer"].config == SMALL_TRANSFORMER


def test_no_family_knows_the_tensors(own_world: Path) -> None:
    save({"a": torch.ones(2)}, own_world / MODEL / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt.*tensors a.*checkpoints inspect"):
        open_named(MODEL, own_world)


def test_adapters_are_no_model(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "model.pt"
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    name = "net.blocks.block1.blocks.0.block.attn.to_q.0.lora_A.weight"
    save({name: torch.ones(2, 2)}, path)
    with pytest.raises(
        CheckpointError, match=r"1 tensors of LoRA adapters.*lora_A.*no model.*lora"
    ):
        open_named(TEXT2WORLD, own_diffusion)
    save({**tensors, name: torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"1 lack their other half: .*lora_A"):
        open_named(TEXT2WORLD, own_diffusion)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "shape"])
def test_transformers_are_strict(wrong: str, own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "model.pt"
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    name = "net.blocks.block1.blocks.2.block.layer1.weight"
    if wrong == "missing":
        del tensors[name]
    else:
        name = name if wrong == "shape" else "net.more"
        tensors[name] = torch.ones(3, 3)
    save(tensors, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_named(TEXT2WORLD, own_diffusion)


def test_a_download_that_was_not_finished(own_diffusion: Path, own_world: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "model.pt"
    path.rename(path.with_name("model.pt.part"))
    with pytest.raises(CheckpointError, match=r"no model\.pt .*not finished \(model\.pt\.part\)"):
        open_named(TEXT2WORLD, own_diffusion)
    path = own_diffusion / CONTINUOUS / "mean_std.pt"
    path.rename(path.with_name("x.part"))
    with pytest.raises(CheckpointError, match=r"no mean_std\.pt.*not finished \(x\.part\)"):
        open_named(VIDEO2WORLD, own_diffusion)
    for half in ("encoder", "decoder"):
        path = own_world / TOKENIZER / f"{half}.safetensors"
        path.rename(path.with_name(f"{half}.jit.part"))
    with pytest.raises(CheckpointError, match=r"not finished \(decoder\.jit\.part, encoder"):
        open_named(MODEL, own_world, **BY_TOKENIZER)


def test_every_searched_folder_is_named(
    own_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_world / TOKENIZER).rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", "there")
    places = f"{tmp_path} or {own_world} or there"
    with pytest.raises(CheckpointError, match=rf"{TOKENIZER}.* is in {places}$"):
        open_named(own_world / MODEL, tmp_path, **BY_TOKENIZER)


def test_folders_that_are_there_are_listed(small_world: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds: {MODEL}, {TOKENIZER}"):
        open_named("Cosmos-Predict1-12B", small_world)


@pytest.mark.parametrize("family", ["diffusion", "predict2.5"])
def test_parts_must_agree(family: str, own_diffusion: Path, own_predict2_5: Path) -> None:
    if family == "diffusion":
        write_tokenizer(own_diffusion / "narrow", latent_channels=4)
        name, root = TEXT2WORLD, own_diffusion
    else:
        few: dict[str, Any] = {"latent_channels": 4, "mean": (0.0,) * 4, "std": (1.0,) * 4}
        tokenizer = WanTokenizer(replace(WAN, **few))
        draw_weights(tokenizer)
        name, root = POST.name, own_predict2_5
        (root / "narrow").mkdir()
        (root / "narrow" / "config.json").write_text(json.dumps(wan_settings(tokenizer.config)))
        tensors = stored_tensors(tokenizer, key_map(tokenizer.config, True))
        save(tensors, root / "narrow" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"narrow.* 4 latent channels, .* 16.*together"):
        open_named(name, root, tokenizer_dir="narrow")


def test_an_optional_part_may_be_missing(own_diffusion: Path) -> None:
    """Where a request needs it, the reason is the message; a chosen one must be there."""
    elsewhere = own_diffusion / "mine"
    (own_diffusion / TEXT_ENCODER).rename(elsewhere)
    opened = open_named(TEXT2WORLD, own_diffusion)
    assert "text" not in opened.parts
    for words in (TEXT_ENCODER, str(own_diffusion)):
        assert words in opened.missing["text"]
    with pytest.raises(
        CheckpointError, match=rf"{TEXT_ENCODER}.*needed for prompt.*text_encoder_di"
    ):
        checked(opened, **DEFAULTS, prompt="x")
    for named in ("mine", elsewhere, str(elsewhere)):
        assert "text" in open_named(TEXT2WORLD, own_diffusion, text_encoder_dir=named).parts
    with pytest.raises(CheckpointError, match=r"no folder absent \(text_encoder_dir\)"):
        open_named(TEXT2WORLD, own_diffusion, text_encoder_dir="absent")
    # as the hub keeps it
    shutil.copytree(elsewhere, own_diffusion / "models--google-t5--t5-11b" / "snapshots" / "0a1b")
    assert "text" in open_named(TEXT2WORLD, own_diffusion).parts


def test_an_optional_part_may_be_broken(own_diffusion: Path) -> None:
    weights = own_diffusion / TEXT_ENCODER / "model.safetensors"
    for damage, message in (
        (lambda: weights.write_bytes(b"x"), str(weights)),
        (weights.unlink, ""),
    ):
        damage()
        missing = open_named(TEXT2WORLD, own_diffusion).missing["text"]
        assert message in missing
        with pytest.raises(CheckpointError, match=re.escape(missing)):
            open_named(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def test_options_are_the_family_s(roots: dict[str, Path]) -> None:
    for name, root, wrong in (
        (MODEL, roots["autoregressive"], {"tokenizer_dir": "x"}),
        (TEXT2WORLD, roots["diffusion"], {"offload_ar_model": True}),
        (POST.name, roots["predict2.5"], {"generation": "1.0"}),
    ):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: no such option"):
            worldline.load(name, checkpoint_dir=root, **wrong)


def test_defaults_in_config(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "config.json"
    change(path, negative_prompt="", fps=12.5, rotary_precision="float32", height=64)
    defaults = open_named(TEXT2WORLD, own_diffusion).defaults
    assert (defaults["negative_prompt"], defaults["fps"]) == ("", 12.5)
    assert (defaults["rotary_precision"], defaults["height"]) == ("float32", 64)
    for wrong in ({"height": "32"}, {"num_steps": True}, {"fps": -1}, {"rotary_precision": "half"}):
        good = path.read_text()
        change(path, **wrong)
        with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(wrong))} is "):
            open_named(TEXT2WORLD, own_diffusion)
        path.write_text(good)


@pytest.mark.parametrize("family", ["autoregressive", "diffusion", "predict2.5"])
def test_parts_are_as_stored(family: str, roots: dict[str, Path]) -> None:
    name = {"autoregressive": MODEL, "diffusion": TEXT2WORLD, "predict2.5": POST.name}[family]
    options = BY_TOKENIZER if family == "autoregressive" else {}
    parts = load_named(name, roots[family], **options)
    network = parts.opened["transformer"]
    for ours, parameter in parts.transformer.module.named_parameters():
        assert torch.equal(parameter, network.source.read(network.keys.released(ours)).float())
        assert not parameter.requires_grad
    assert not parts.tokenizer.module.training
    assert not parts.transformer.module.training


def test_files_that_decide(own_diffusion: Path, own_predict2_5: Path) -> None:
    opened = open_named(TEXT2WORLD, own_diffusion)
    names = {part: {path.name for path in found.files} for part, found in opened.parts.items()}
    assert names["transformer"] == {"model.pt", "config.json"}
    assert names["tokenizer"] == {"encoder.safetensors", "decoder.safetensors", "mean_std.pt"}
    assert {"model.safetensors", "config.json"} <= names["text"]

    opened = open_named(POST.name, own_predict2_5)
    request = checked(opened, prompt="x", num_video_frames=9, height=32, width=48)
    before = fingerprint(opened, PLAIN, request, None)
    assert fingerprint(opened, PLAIN, request, None) == before
    shared = replace(PLAIN, mesh=plan_mesh(Layout(cp=2)))  # how processes share changes none
    assert fingerprint(opened, shared, request, None) == before
    assert "shards" not in vars(opened["transformer"])  # nor what earlier versions have hashed
    path = own_predict2_5 / FLOW_FOLDER / "tokenizer.pth"
    path.touch()
    assert fingerprint(opened, PLAIN, request, None) == before
    path.write_bytes(path.read_bytes() + b"1")
    assert fingerprint(opened, PLAIN, request, None) != before
    (own_predict2_5 / FLOW_FOLDER / "tokenizer.pth").unlink()
    with pytest.raises((CheckpointError, OSError), match=r"tokenizer\.pth"):
        fingerprint(opened, PLAIN, request, None)


def test_bundled(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "BUNDLED", small_world)
    assert locate.bundled_names() == [f"tiny-{MODEL}"]
    opened = open_named(f"tiny-{MODEL}", "nowhere")
    assert opened.place.bundled
    assert opened.name == f"tiny-{MODEL}"
    assert "decoder" not in opened.parts  # none is bundled
    with pytest.raises(CheckpointError, match=rf"no bundled model tiny-x; there are: tiny-{MODEL}"):
        open_named("tiny-x", "nowhere")
    monkeypatch.setattr(locate, "BUNDLED", tmp_path)
    assert locate.bundled_names() == []


def test_what_ships_is_small() -> None:
    """At most 8 MB a model and 32 MB for all, so that the whole tree stays small."""
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in locate.BUNDLED.iterdir()
    }
    assert locate.bundled_names()
    assert max(sizes.values()) <= 8e6
    assert sum(sizes.values()) <= 32e6


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for wrong in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"no device {wrong} here"):
            choose_device(wrong)
    with pytest.raises(InputError, match=r"device is 1\.5"):
        LoadOptions.parse({"device": 1.5})


@pytest.mark.parametrize(
    ("device", "stated", "dtype", "text"),
    [
        ("cpu", {}, torch.float32, torch.float32),
        ("cuda", {}, torch.bfloat16, torch.bfloat16),
        ("cuda", {"dtype": "float16"}, torch.float16, torch.bfloat16),  # T5 overflows in float16
        ("cpu", {"dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ("cpu", {"text_encoder_dtype": torch.bfloat16}, torch.float32, torch.bfloat16),
    ],
)
def test_precision(
    device: str,
    stated: dict[str, Any],
    dtype: torch.dtype,
    text: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worldline.opening.choose_device", torch.device)
    monkeypatch.setattr("worldline.opening.fused", lambda device: False)
    compute = choose_compute(DiffusionOptions.parse({"device": device, **stated}))
    assert (compute.device.type, compute.dtype, compute.text_dtype) == (device, dtype, text)


def test_load_twice(small_world: Path) -> None:
    """The function is still the function once its modules are imported."""
    for _ in range(2):
        loaded = worldline.load(small_world / MODEL, disable_guardrail=True, **BY_TOKENIZER)
        assert loaded.name == MODEL
    assert callable(worldline.load)


def test_the_grid_of_a_model_without_config(
    own_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_world / MODEL / "config.json").unlink()
    with caplog.at_level(logging.INFO, logger="worldline"):
        opened = open_named(MODEL, own_world, **BY_TOKENIZER)
    assert opened["transformer"].config.grid.frames == 5
    assert opened.defaults == {}
    assert f"{own_world / MODEL}: the released grid" in caplog.text


def test_embeddings_without_effect_are_not_compared(tiny_predict2_5: Path, tmp_path: Path) -> None:
    opened = open_named(POST.name, tiny_predict2_5, disable_guardrails=True)
    file = tmp_path / "negative.pt"
    torch.save(torch.zeros(1, 3, CONFIG.feature_width), file)
    words = {"prompt": "x", "negative_prompt_embeddings": str(file)}
    without, guided = (
        opened.family.request.parse({**words, "guidance": guidance}) for guidance in (0, 3)
    )
    before = [fingerprint(opened, PLAIN, request, None) for request in (without, guided)]
    file.write_bytes(b"no embedding")
    assert fingerprint(opened, PLAIN, without, None) == before[0]
    assert fingerprint(opened, PLAIN, guided, None) != before[1]
    assert not read_prompts(opened, without)[0]  # nor read
