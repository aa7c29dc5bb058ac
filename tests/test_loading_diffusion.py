"""Which files a diffusion world's name leads to, what is refused, and how much memory it needs."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from worldline import loading
from worldline.catalog import ENTRIES
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.loading import AutoregressiveFiles, DiffusionFiles, DiffusionPlan
from worldline.machine import Memory
from worldline.models.predict1_dit.model import PRESETS
from worldline.models.predict1_dit.weights import diffusers_config, diffusers_tensors
from worldline.pipelines.diffusion import NEGATIVE_PROMPT
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.tokenizers.cosmos.diffusers import diffusers_config as vae_config
from worldline.tokenizers.cosmos.diffusers import diffusers_tensors as vae_tensors
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save

from .conftest import MODEL as AUTOREGRESSIVE
from .conftest import TOKENIZER as DISCRETE
from .tiny_diffusion import (
    CONTEXT_LENGTH,
    CONTINUOUS,
    TEXT2WORLD,
    TEXT_ENCODER,
    VIDEO2WORLD,
    config,
    write_tokenizer,
)

OLD = "Cosmos-1.0-Diffusion-7B-Text2World"
OLD_CONTINUOUS = "Cosmos-1.0-Tokenizer-CV8x8x8"
CPU = torch.device("cpu")


def find(name: str | Path, folder: str | Path, **options: Any) -> DiffusionFiles:
    return loading.find_diffusion(name, folder, **options)


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_by_name_by_path_and_by_file(tiny_diffusion: Path) -> None:
    for name in (TEXT2WORLD, tiny_diffusion / TEXT2WORLD, tiny_diffusion / TEXT2WORLD / "model.pt"):
        files = find(name, tiny_diffusion)
        assert files.folder == tiny_diffusion / TEXT2WORLD
        assert files.config == config(condition_mask=False)
        assert files.generation == "Predict1"
        assert files.tokenizer_config.levels is None
        assert files.statistics.frames == 16
        assert files.text is not None
        assert files.context_length == CONTEXT_LENGTH
        assert files.defaults.text2world
        assert not files.bundled
    # the parts are found beside the model, wherever --checkpoint_dir points
    assert find(tiny_diffusion / VIDEO2WORLD, "nowhere").folder.name == VIDEO2WORLD


def test_either_family_by_what_the_folder_holds(small_world: Path, tiny_diffusion: Path) -> None:
    assert isinstance(loading.find_world(AUTOREGRESSIVE, small_world), AutoregressiveFiles)
    assert isinstance(loading.find_world(VIDEO2WORLD, tiny_diffusion), DiffusionFiles)
    with pytest.raises(CheckpointError, match="is a diffusion world, not an autoregressive one"):
        loading.find_autoregressive(TEXT2WORLD, tiny_diffusion)
    with pytest.raises(CheckpointError, match="is no diffusion transformer"):
        find(AUTOREGRESSIVE, small_world)
    with pytest.raises(InputError, match="an autoregressive world, which has no tokenizer_dir"):
        loading.find_world(AUTOREGRESSIVE, small_world, tokenizer_dir="x")


def test_the_generation(own_diffusion: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the folder's name, or one around it, whatever is asked; else as asked."""
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD)
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / "mine")
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / f"{TEXT2WORLD}_post-trained-lora")
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD / "snapshots" / "0a1b")
    for name, asked, found in (
        (OLD, None, "1.0"),
        (OLD, "Predict1", "1.0"),
        (f"{OLD}/snapshots/0a1b", None, "1.0"),
        (TEXT2WORLD, "1.0", "Predict1"),
        (f"{TEXT2WORLD}_post-trained-lora", None, "Predict1"),
        ("mine", None, "Predict1"),
        ("mine", "1.0", "1.0"),
    ):
        assert find(name, own_diffusion, generation=asked).generation == found
    with caplog.at_level("INFO", logger="worldline"):
        find(OLD, own_diffusion, generation="Predict1")
    assert f"generation Predict1 has no effect: {OLD} is of 1.0" in caplog.text
    with pytest.raises(InputError, match="generation is '2'; it must be"):
        find("mine", own_diffusion, generation="2")


def test_tokenizers_of_both_generations(own_diffusion: Path) -> None:
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD)
    shutil.copytree(own_diffusion / CONTINUOUS, own_diffusion / OLD_CONTINUOUS)
    assert find(TEXT2WORLD, own_diffusion).tokenizer.path.name == CONTINUOUS
    assert find(OLD, own_diffusion).tokenizer.path.name == OLD_CONTINUOUS
    shutil.rmtree(own_diffusion / CONTINUOUS)
    assert find(TEXT2WORLD, own_diffusion).tokenizer.path.name == OLD_CONTINUOUS
    shutil.rmtree(own_diffusion / OLD_CONTINUOUS)
    with pytest.raises(CheckpointError, match="no continuous tokenizer: neither Cosmos-Tok"):
        find(TEXT2WORLD, own_diffusion)


def test_another_tokenizer(own_diffusion: Path, small_world: Path, tmp_path: Path) -> None:
    write_tokenizer(own_diffusion / "other", channels=8)
    write_tokenizer(tmp_path / "elsewhere", channels=8)
    for named in ("other", tmp_path / "elsewhere", str(tmp_path / "elsewhere")):
        assert find(TEXT2WORLD, own_diffusion, tokenizer_dir=named).tokenizer_config.channels == 8
    with pytest.raises(CheckpointError, match=r"no folder absent \(--tokenizer_dir\), nor is it"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir="absent")
    with pytest.raises(CheckpointError, match="is a discrete tokenizer; a diffusion world needs"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir=small_world / DISCRETE)
    write_tokenizer(own_diffusion / "narrow", latent_channels=8)
    with pytest.raises(CheckpointError, match=r"latents of 8 channels.*do not belong together"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir="narrow")


def test_missing_statistics(own_diffusion: Path) -> None:
    (own_diffusion / CONTINUOUS / "mean_std.pt").rename(own_diffusion / CONTINUOUS / "x.part")
    with pytest.raises(CheckpointError, match=r"no mean_std\.pt, .*not finished \(x\.part\)"):
        find(TEXT2WORLD, own_diffusion)


def test_missing_and_other_text_encoders(own_diffusion: Path) -> None:
    elsewhere = own_diffusion / "mine"
    (own_diffusion / TEXT_ENCODER).rename(elsewhere)
    files = find(TEXT2WORLD, own_diffusion)
    assert files.text is None
    assert files.why_no_text == (
        f"there is no text encoder: no folder google-t5/t5-11b in {own_diffusion}"
    )
    for named in ("mine", elsewhere):
        files = find(TEXT2WORLD, own_diffusion, text_encoder_dir=named)
        assert files.text is not None
    with pytest.raises(CheckpointError, match=r"no folder absent \(--text_encoder_dir\)"):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir="absent")
    # as the hub keeps it
    shutil.copytree(elsewhere, own_diffusion / "models--google-t5--t5-11b" / "snapshots" / "0a1b")
    assert find(TEXT2WORLD, own_diffusion).text is not None


def test_a_damaged_text_encoder_is_told_when_it_is_needed(own_diffusion: Path) -> None:
    (own_diffusion / TEXT_ENCODER / "model.safetensors").write_bytes(b"x")
    files = find(TEXT2WORLD, own_diffusion)
    assert files.text is None
    assert "the text encoder is not whole: " in files.why_no_text
    with pytest.raises(CheckpointError):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def test_a_text_encoder_of_another_width(own_diffusion: Path) -> None:
    from worldline.text.t5 import export_t5, new_t5

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    export_t5(new_t5(sizes), own_diffusion / TEXT_ENCODER)
    files = find(TEXT2WORLD, own_diffusion)
    assert files.text is None
    assert re.search(r"embeddings of width 16, but .* was trained on 24", files.why_no_text)
    with pytest.raises(CheckpointError, match="do not belong together"):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def test_a_folder_of_diffusers(tiny_diffusion: Path, tmp_path: Path) -> None:
    """All parts below one folder; without `vae`, the tokenizer of videos is the released one."""
    own = tmp_path / "Cosmos-1.0-Diffusion-7B-Video2World"
    recorder = Recorder(CPU)
    parts = loading.load_diffusion(find(VIDEO2WORLD, tiny_diffusion), CPU, torch.float32, recorder)
    (own / "transformer").mkdir(parents=True)
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    save(diffusers_tensors(parts.transformer.module), weights)
    settings = diffusers_config(parts.config)
    (own / "transformer" / "config.json").write_text(json.dumps(settings))
    shutil.copytree(tiny_diffusion / TEXT_ENCODER, own / "text_encoder")
    (own / "tokenizer").mkdir()
    (own / "text_encoder" / "tokenizer_config.json").rename(
        own / "tokenizer" / "tokenizer_config.json"
    )
    for name in (own, own / "transformer", weights):
        files = loading.find_world(name, tiny_diffusion)
        assert isinstance(files, DiffusionFiles)
        assert files.folder == own
        assert files.generation == "1.0"
        assert files.dit.layout == "diffusers"
        assert files.text is not None
        assert files.text.folder == own / "text_encoder"
    (own / "vae").mkdir()
    coder, statistics = parts.tokenizer.module, parts.files.statistics
    save(vae_tensors(coder), own / "vae" / "diffusion_pytorch_model.safetensors")
    (own / "vae" / "config.json").write_text(json.dumps(vae_config(coder.config, statistics)))
    files = find(own, "nowhere")
    assert torch.equal(files.statistics.std, statistics.std)
    assert {path.parent for path in files.tokenizer.files} == {own / "vae"}
    assert any("vae/config.json" in one["path"] for one in files.identity()["tokenizer"])
    same = loading.load_diffusion(files, CPU, torch.float32, recorder)
    for ours, theirs in ((parts.transformer, same.transformer), (parts.tokenizer, same.tokenizer)):
        both = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in both)


def test_wrong_transformers(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "model.pt"
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    name = "net.blocks.block1.blocks.2.block.layer1.weight"
    save({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        find(TEXT2WORLD, own_diffusion)
    path.unlink()
    path.with_name("model.pt.part").touch()
    with pytest.raises(CheckpointError, match=r"holds no model\.pt .*not finished"):
        find(TEXT2WORLD, own_diffusion)


def test_what_a_world_says_of_requests(own_diffusion: Path) -> None:
    path = own_diffusion / VIDEO2WORLD / "config.json"
    defaults = find(VIDEO2WORLD, own_diffusion).defaults
    assert not defaults.text2world
    assert defaults.negative_prompt == NEGATIVE_PROMPT
    assert defaults.rotary_precision == "bfloat16"
    change(path, text2world=True, negative_prompt="", fps=12.5, rotary_precision="float32")
    defaults = find(VIDEO2WORLD, own_diffusion).defaults
    assert defaults.text2world
    assert (defaults.negative_prompt, defaults.fps) == ("", 12.5)
    for wrong in (
        {"text2world": 1},
        {"height": "32"},
        {"num_steps": True},
        {"fps": -1},
        {"rotary_precision": "half"},
    ):
        good = path.read_text()
        change(path, **wrong)
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} is "):
            find(VIDEO2WORLD, own_diffusion)
        path.write_text(good)


def test_released_files_say_nothing(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "config.json"
    path.write_text(json.dumps({"rope_ratio": [2, 1, 1]}))
    defaults = find(TEXT2WORLD, own_diffusion).defaults
    assert (defaults.num_video_frames, defaults.height, defaults.width) == (121, 704, 1280)
    assert (defaults.fps, defaults.guidance, defaults.num_steps) == (24, 7, 35)


def test_identity_names_what_decides(own_diffusion: Path) -> None:
    found = find(TEXT2WORLD, own_diffusion).identity()
    names = {part: {Path(one["path"]).name for one in files} for part, files in found.items()}
    assert names["transformer"] == {"model.pt", "config.json"}
    assert names["tokenizer"] == {"encoder.safetensors", "decoder.safetensors", "mean_std.pt"}
    assert {"model.safetensors", "config.json"} <= names["text_encoder"]
    (own_diffusion / TEXT2WORLD / "model.pt").touch()
    assert find(TEXT2WORLD, own_diffusion).identity() != found


def test_bundled_worlds(tiny_diffusion: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bundled = shutil.copytree(tiny_diffusion, tmp_path / "bundled")
    monkeypatch.setattr(loading, "BUNDLED", bundled)
    (bundled / CONTINUOUS / "config.json").write_text("{}")
    names = loading.bundled_names()
    assert names == [f"tiny-{TEXT2WORLD}", f"tiny-{VIDEO2WORLD}"]
    files = loading.find_world(names[0], "nowhere")
    assert isinstance(files, DiffusionFiles)
    assert files.bundled
    assert files.text is not None
    with pytest.raises(CheckpointError, match=f"there are: {names[0]}, {names[1]}"):
        loading.find_world("tiny-x", "nowhere")


# --- memory


def plan(size: str, *flags: str, video: VideoShape | None = None) -> DiffusionPlan:
    return loading.plan_diffusion(
        PRESETS[size],
        TOKENIZERS["CV8x8x8"],
        video=video or VideoShape(121, 704, 1280),
        dtype=torch.bfloat16,
        text_bytes=9_729_583_104,
        **dict.fromkeys(flags, True),
    )


def test_plans() -> None:
    """Each flag lowers the need or leaves it, and the published needs are met."""
    flags = loading.DIFFUSION_OFFLOAD_FLAGS
    for size, most in (("7B-Video2World", 24e9), ("14B-Video2World", 36e9)):
        whole = plan(size)
        for count in range(1, 4):
            for chosen in combinations(flags, count):
                assert plan(size, *chosen).peak <= whole.peak
        assert PRESETS[size].depth * 4e8 < plan(size, *flags).peak <= most
        assert plan(size, "offload_diffusion_transformer").text < whole.text
        assert plan(size, video=VideoShape(57, 480, 640)).peak < whole.peak


def test_too_little_memory(tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find(VIDEO2WORLD, tiny_diffusion)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 8_000_000_000))
    cuda, recorder = torch.device("cuda"), Recorder(CPU)
    with pytest.raises(InsufficientMemoryError, match=r"needs about .* no offload flag is enough"):
        loading.load_diffusion(files, cuda, torch.bfloat16, recorder)


def test_the_memory_of_a_larger_video(tiny_diffusion: Path) -> None:
    files = find(VIDEO2WORLD, tiny_diffusion)
    large = VideoShape(41, 96, 128)
    assert loading._need_of(files, torch.float32, video=large)(()) > loading._need_of(
        files, torch.float32
    )(())


def test_fewest_flags(tiny_diffusion: Path) -> None:
    cuda = torch.device("cuda")
    files = find(VIDEO2WORLD, tiny_diffusion)
    tight = loading.fit_files(files, cuda, Memory(10, 10))
    roomy = loading.fit_files(files, cuda, Memory(1 << 40, 1 << 40))
    assert roomy.fits
    assert roomy.flags == ()
    assert tight.fits is False
    for entry in ENTRIES:
        found = loading.fit_entry(entry, cuda, Memory(int(25e9), int(25e9)))
        assert (found is None) == (not entry.command)
        if entry.name == "Cosmos-Predict1-7B-Video2World":
            assert found is not None
            assert found.fits
            assert "offload_text_encoder_model" in found.flags
