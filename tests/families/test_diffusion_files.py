"""Files of diffusion worlds: generation, tokenizer and its statistics, settings, both layouts."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from tiny.encoders import export_t5, new_t5
from tiny.export import stored_tensors
from worldline.errors import CheckpointError
from worldline.families.diffusion.family import generation_of, starts_from_text
from worldline.families.diffusion.model import RELEASED_RATIOS
from worldline.family import Opened, Parts
from worldline.tokenizers.cosmos.weights import key_map
from worldline.tokenizers.layouts import cosmos_settings
from worldline.weights.checkpoint import save

from ..conftest import TOKENIZER as DISCRETE
from ..diffusers_layout import diffusers_config, diffusers_tensors
from ..tiny_diffusion import CONTINUOUS, TEXT2WORLD, TEXT_ENCODER, VIDEO2WORLD, write_tokenizer
from .worlds import checked, load_named, open_named

OLD = "Cosmos-1.0-Diffusion-7B-Text2World"
OLD_CONTINUOUS = "Cosmos-1.0-Tokenizer-CV8x8x8"


def folders_of(opened: Opened, part: str) -> set[Path]:
    return {path.parent for path in opened[part].files}


def test_the_generation(own_diffusion: Path) -> None:
    """As chosen; else by the name of the model's own folder, which a hub cache has above it."""
    cache = Path(f"models--nvidia--{OLD}") / "snapshots" / "0a1b"
    inside = Path("Cosmos-1.0-Diffusion-runs") / "mine"
    lora = f"{TEXT2WORLD}_post-trained-lora"
    for name in (OLD, "mine", lora, cache, inside):
        shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / name)
    for part in (CONTINUOUS, TEXT_ENCODER):
        for name in (cache, inside):
            shutil.copytree(own_diffusion / part, own_diffusion / name.parent / part)
    for name, chosen, found in (
        (OLD, None, "1.0"),
        (OLD, "Predict1", "Predict1"),
        (cache, None, "1.0"),
        (cache, "Predict1", "Predict1"),
        (inside, None, "Predict1"),
        (TEXT2WORLD, "1.0", "1.0"),
        (lora, None, "Predict1"),
        ("mine", None, "Predict1"),
        ("mine", "1.0", "1.0"),
    ):
        assert generation_of(open_named(name, own_diffusion, generation=chosen)) == found


def test_tokenizers_of_both_generations(own_diffusion: Path) -> None:
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD)
    shutil.copytree(own_diffusion / CONTINUOUS, own_diffusion / OLD_CONTINUOUS)
    for name, tokenizer in ((TEXT2WORLD, CONTINUOUS), (OLD, OLD_CONTINUOUS)):
        opened = open_named(name, own_diffusion)
        assert folders_of(opened, "tokenizer") == {own_diffusion / tokenizer}
    shutil.rmtree(own_diffusion / CONTINUOUS)
    opened = open_named(TEXT2WORLD, own_diffusion)
    assert folders_of(opened, "tokenizer") == {own_diffusion / OLD_CONTINUOUS}
    shutil.rmtree(own_diffusion / OLD_CONTINUOUS)
    with pytest.raises(CheckpointError, match=f"neither {CONTINUOUS} nor {OLD_CONTINUOUS}"):
        open_named(TEXT2WORLD, own_diffusion)


def test_another_tokenizer(own_diffusion: Path, small_world: Path, tmp_path: Path) -> None:
    write_tokenizer(own_diffusion / "other", channels=8)
    write_tokenizer(tmp_path / "elsewhere", channels=8)
    for named in ("other", tmp_path / "elsewhere"):
        opened = open_named(TEXT2WORLD, own_diffusion, tokenizer_dir=named)
        assert opened["tokenizer"].config.channels == 8
    with pytest.raises(CheckpointError, match=r"no folder absent \(tokenizer_dir\)"):
        open_named(TEXT2WORLD, own_diffusion, tokenizer_dir="absent")
    with pytest.raises(
        CheckpointError, match=f"{DISCRETE} is a discrete tokenizer; .*{CONTINUOUS}"
    ):
        open_named(TEXT2WORLD, own_diffusion, tokenizer_dir=small_world / DISCRETE)


def test_statistics_of_other_latents(own_diffusion: Path) -> None:
    path = own_diffusion / CONTINUOUS / "mean_std.pt"
    for shape, frames in (((16 * 5,), 5), ((16, 3), 3), ((1, 16), 1)):
        torch.save((torch.zeros(shape), torch.ones(shape)), path)
        opened = open_named(TEXT2WORLD, own_diffusion)
        assert opened["tokenizer"].statistics.frames == frames
    for shape in ((8, 16), (17 * 16 + 1,)):
        torch.save((torch.zeros(shape), torch.ones(shape)), path)
        with pytest.raises(CheckpointError, match=r"mean_std\.pt: no statistics of 16 channels"):
            open_named(TEXT2WORLD, own_diffusion)
    path.unlink()
    save({"mean": torch.zeros(8, 4), "std": torch.ones(8, 4)}, path.with_suffix(".safetensors"))
    with pytest.raises(CheckpointError, match=r"of 16 channels: mean is \[8, 4\]"):
        open_named(TEXT2WORLD, own_diffusion)


def test_a_text_encoder_of_another_width(own_diffusion: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    export_t5(new_t5(sizes), own_diffusion / TEXT_ENCODER)
    missing = open_named(TEXT2WORLD, own_diffusion).missing["text"]
    assert re.search("width 16, .* 24", missing)
    with pytest.raises(CheckpointError, match=r"width 16, .* 24"):
        open_named(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def test_training_writes_several_files(own_diffusion: Path) -> None:
    folder = own_diffusion / TEXT2WORLD
    for number in (8, 10, 9):
        shutil.copy(folder / "model.pt", folder / f"iter_{number:09}.pt")
    assert open_named(TEXT2WORLD, own_diffusion)["transformer"].path == folder / "model.pt"
    (folder / "model.pt").unlink()
    newest = folder / "iter_000000010.pt"
    assert open_named(TEXT2WORLD, own_diffusion)["transformer"].path == newest


def test_another_s_config_beside_a_released_model(
    own_diffusion: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The released pipelines do not read it: it matters where it alone has a fact, or if ours."""
    path = own_diffusion / TEXT2WORLD / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"needs its rotary.*config\.json"):
        open_named(TEXT2WORLD, own_diffusion)
    monkeypatch.setitem(RELEASED_RATIOS, 48, (2.0, 1.0, 1.0))
    for text, reason in (
        ("{", "cannot be read"),
        ("[]", "holds no settings"),
        ('{"height": "tall", "fps": [], "architectures": []}', "has no effect"),
    ):
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="worldline"):
            assert open_named(TEXT2WORLD, own_diffusion).defaults == {}
        assert reason in caplog.text
    for wrong in ({"rope_ratio": [1, 2]}, {"base_fps": [24]}, {"base_fps": 24, "height": "tall"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=f"{[*wrong][-1]} is "):
            open_named(TEXT2WORLD, own_diffusion)


def test_a_model_may_start_from_text_too(own_diffusion: Path) -> None:
    path = own_diffusion / VIDEO2WORLD / "config.json"
    settings = json.loads(path.read_text())
    for starts in (False, True):
        path.write_text(json.dumps({**settings, "text2world": starts}))
        assert starts_from_text(open_named(VIDEO2WORLD, own_diffusion)) == starts
    path.write_text(json.dumps({**settings, "text2world": 1}))
    with pytest.raises(CheckpointError, match="text2world is 1"):
        open_named(VIDEO2WORLD, own_diffusion)


def test_rotary_precision_is_the_model_s(own_diffusion: Path) -> None:
    opened = open_named(TEXT2WORLD, own_diffusion)
    sizes = {**opened.defaults, "prompt": "x"}
    assert checked(opened, **sizes).rotary_precision == "bfloat16"
    assert checked(opened, **sizes, rotary_precision="float32").rotary_precision == "float32"


def write_diffusers(own: Path, parts: Parts) -> Path:
    """Write a transformer as diffusers does; return its file."""
    (own / "transformer").mkdir(parents=True)
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    save(diffusers_tensors(parts.transformer.module), weights)
    settings = diffusers_config(parts.config)
    (own / "transformer" / "config.json").write_text(json.dumps(settings))
    return weights


def write_vae(own: Path, parts: Parts) -> None:
    (own / "vae").mkdir()
    coder, statistics = parts.tokenizer.module, parts.opened["tokenizer"].statistics
    tensors = stored_tensors(coder, key_map(coder.config, True))
    save(tensors, own / "vae" / "diffusion_pytorch_model.safetensors")
    (own / "vae" / "config.json").write_text(json.dumps(cosmos_settings(coder.config, statistics)))


def write_text_encoder(own: Path, source: Path) -> None:
    shutil.copytree(source / TEXT_ENCODER, own / "text_encoder")
    (own / "tokenizer").mkdir()
    (own / "text_encoder" / "tokenizer_config.json").rename(
        own / "tokenizer" / "tokenizer_config.json"
    )


def test_a_folder_of_both_layouts(own_diffusion: Path) -> None:
    """As the repositories of 1.0 are: everything follows the file that is opened."""
    own = own_diffusion / VIDEO2WORLD
    parts = load_named(VIDEO2WORLD, own_diffusion)
    write_diffusers(own, parts)
    write_vae(own, parts)
    write_text_encoder(own, own_diffusion)
    path = own / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fps": 12}))
    for name in (own, own / "model.pt"):
        opened = open_named(name, own_diffusion)
        assert (opened.folder, opened.defaults["fps"]) == (own, 12)
        assert folders_of(opened, "tokenizer") == {own_diffusion / CONTINUOUS}
        assert opened["text"].folder == own_diffusion / TEXT_ENCODER
    opened = open_named(own / "transformer", own_diffusion)
    assert (opened.folder, opened.defaults) == (own, {})
    assert folders_of(opened, "tokenizer") == {own / "vae"}
    assert opened["text"].folder == own / "text_encoder"
    # what is nowhere else is taken from there all the same
    (own_diffusion / CONTINUOUS).rename(own_diffusion / "tokenizer")
    (own_diffusion / TEXT_ENCODER).rename(own_diffusion / "encoder")
    opened = open_named(VIDEO2WORLD, own_diffusion)
    assert opened["transformer"].path == own / "model.pt"
    assert folders_of(opened, "tokenizer") == {own / "vae"}
    assert opened["text"].folder == own / "text_encoder"


def test_a_vae_without_weights_hides_no_tokenizer(own_diffusion: Path) -> None:
    own = own_diffusion / "mine"
    parts = load_named(VIDEO2WORLD, own_diffusion)
    write_diffusers(own, parts)
    for folder in (own, own_diffusion / CONTINUOUS):
        write_vae(folder, parts)
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    opened = open_named(own, own_diffusion)
    assert folders_of(opened, "tokenizer") == {own_diffusion / CONTINUOUS}
    shutil.rmtree(own_diffusion / CONTINUOUS)
    with pytest.raises(CheckpointError, match=r"vae.*diffusion_pytorch_model\.saf"):
        open_named(own, own_diffusion)


def test_a_folder_of_diffusers_whose_files_have_names_of_their_own(
    tiny_diffusion: Path, tmp_path: Path
) -> None:
    own = tmp_path / "mine"
    parts = load_named(VIDEO2WORLD, tiny_diffusion)
    weights = write_diffusers(own, parts)
    weights = weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    write_vae(own, parts)
    vae = own / "vae" / "my_vae"
    (own / "vae" / "diffusion_pytorch_model.safetensors").rename(vae)
    write_text_encoder(own, tiny_diffusion)
    text = own / "text_encoder" / "model.fp16.safetensors"
    (own / "text_encoder" / "model.safetensors").rename(text)
    for name in (own, own / "transformer", weights):
        opened = open_named(name, tiny_diffusion)
        assert (opened.folder, opened.defaults) == (own, {})
        for part, file in (("transformer", weights), ("tokenizer", vae), ("text", text)):
            assert file in opened[part].files


def test_a_folder_of_diffusers(tiny_diffusion: Path, tmp_path: Path) -> None:
    """All parts below one folder; without `vae`, the tokenizer of videos is the released one."""
    own = tmp_path / "Cosmos-1.0-Diffusion-7B-Video2World"
    parts = load_named(VIDEO2WORLD, tiny_diffusion)
    weights = write_diffusers(own, parts)
    write_text_encoder(own, tiny_diffusion)
    for name in (own, own / "transformer", weights):
        opened = open_named(name, tiny_diffusion)
        assert opened.folder == own
        assert generation_of(opened) == "1.0"
        assert opened["text"].folder == own / "text_encoder"
    write_vae(own, parts)
    same = load_named(own, "nowhere")
    statistics = same.opened["tokenizer"].statistics
    assert torch.equal(statistics.std, parts.opened["tokenizer"].statistics.std)
    assert own / "vae" / "config.json" in same.opened["tokenizer"].files
    for ours, theirs in ((parts.transformer, same.transformer), (parts.tokenizer, same.tokenizer)):
        both = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in both)
