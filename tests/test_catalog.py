"""The catalog agrees with the key manifests of the released files."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import pytest

from worldline.catalog import ENTRIES, advice, find

KEYS = Path(__file__).parent / "keys"
BYTES = {"bfloat16": 2, "float32": 4, "int64": 8, "int32": 4, "float16": 2, "uint8": 1, "bool": 1}


def manifests() -> list[Path]:
    paths = sorted(KEYS.glob("Cosmos-*.json"))
    # other forms of files that are here too
    return [p for p in paths if "diffusers" not in p.stem and not p.stem.endswith(".tp4")]


def test_names_are_unique_and_parts_are_known() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    folders = [folder for entry in ENTRIES for folder in entry.folders]
    assert len(set(folders)) == len(folders)
    for entry in ENTRIES:
        assert set(entry.needs) <= set(names), entry.name
        assert entry.licence
        assert entry.layouts
        for file in entry.files:
            assert len(file.md5) in (0, 32)


@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.stem)
def test_sizes(path: Path) -> None:
    manifest = json.loads(path.read_text())
    folder, _, name = manifest["file"].removeprefix("nvidia/").replace(" ", "/", 1).partition("/")
    entry = find(folder)
    assert entry is not None
    (file,) = (file for file in entry.files if file.name == name)
    nbytes = sum(prod(shape) * BYTES[dtype] for dtype, shape in manifest["tensors"].values())
    assert file.nbytes == nbytes
    if name in ("model.pt", "autoencoder.jit") or "base/" in name:
        assert entry.parameters == manifest["parameters"]
    for other in manifest.get("also_file") or []:
        if "/" in other and other.startswith("Cosmos-"):
            assert find(other.split("/")[0]) is entry


def test_both_generations_are_found(tmp_path: Path) -> None:
    entry = find("Cosmos-1.0-Autoregressive-4B")
    assert entry is find("Cosmos-Predict1-4B")
    assert entry is not None
    assert entry.presence(tmp_path) == ("absent", None)
    old = tmp_path / "Cosmos-1.0-Autoregressive-4B"
    old.mkdir()
    assert entry.presence(tmp_path) == ("partial", old)
    (old / "model.pt").touch()
    assert entry.presence(tmp_path) == ("partial", old)  # an empty file is no checkpoint
    (old / "model.pt").write_bytes(b"x")
    assert entry.presence(tmp_path) == ("partial", old)  # nor is one that was cut off
    os.truncate(old / "model.pt", entry.files[0].nbytes)
    assert entry.presence(tmp_path) == ("present", old)
    new = tmp_path / "Cosmos-Predict1-4B"
    new.mkdir()
    assert entry.presence(tmp_path) == ("present", old)
    (new / "model.safetensors").write_bytes(b"x")
    assert entry.presence(tmp_path) == ("other size", new)
    os.truncate(new / "model.safetensors", entry.nbytes)
    assert entry.presence(tmp_path) == ("present", new)


def test_what_training_saves_is_a_checkpoint(tmp_path: Path) -> None:
    entry = find("Cosmos-Predict1-7B-Video2World")
    assert entry is not None
    folder = tmp_path / entry.folders[0]
    folder.mkdir()
    (folder / "iter_000000010.pt").write_bytes(b"x")
    assert entry.presence(tmp_path) == ("other size", folder)


def test_find() -> None:
    assert find("nothing") is None
    base = find("Cosmos-Predict1-7B-Text2World")
    assert base is not None
    for ending in ("_post-trained", "_post-trained-4gpu_80gb", "_post-trained-lora"):
        assert find(base.name + ending) is base


def test_sizes_of_a_request() -> None:
    """The halves of a tokenizer where they are released, else the whole file."""
    sizes = {entry.name: entry.nbytes for entry in ENTRIES}
    assert sizes["Cosmos-Predict1-4B"] == 8_028_176_384
    assert sizes["Cosmos-Tokenize1-DV8x16x16-720p"] == 91_842_388 + 131_490_340
    assert sizes["Cosmos-Tokenize1-DV4x8x8-360p"] == 226_007_624
    assert sizes["Pixtral-12B"] == 0


def test_layouts_are_those_that_are_read() -> None:
    from worldline.repositories import TRANSFORMER_FILES
    from worldline.tokenizers.cosmos.weights import LAYOUTS

    for entry in ENTRIES:
        if entry.family.endswith("tokenizer"):
            names = ((each,) if isinstance(each, str) else each for each in LAYOUTS)
            assert entry.layouts == tuple(names)
        elif entry.command not in ("", "predict2.5"):
            assert entry.layouts[:3] == tuple((name,) for name in TRANSFORMER_FILES)


def test_what_runs_has_a_preset() -> None:
    from worldline.families.autoregressive.model import PRESETS
    from worldline.families.diffusion.model import PRESETS as DIFFUSION
    from worldline.families.predict2_5.model import PRESETS as FLOW

    commands = {entry.name: entry.command for entry in ENTRIES if entry.command}
    assert commands["Cosmos-Predict1-14B-Video2World"] == "diffusion video2world"
    assert commands["Cosmos-Predict1-7B-Text2World"] == "diffusion text2world"
    assert commands["Cosmos-Predict1-12B"] == "autoregressive base"
    assert commands["Cosmos-Predict1-5B-Video2World"] == "autoregressive video2world"
    assert commands["Cosmos-Predict2.5-14B"] == "predict2.5"
    for entry in ENTRIES:
        if entry.command.startswith("diffusion"):
            config = DIFFUSION[entry.preset]
            assert config.condition_mask == ("video2world" in entry.command)
        elif entry.command not in ("", "tokenize"):
            assert entry.preset in (FLOW if entry.command == "predict2.5" else PRESETS)


def test_advice_on_a_folder_that_is_not_there() -> None:
    for entry in ENTRIES:
        found = advice(entry.folders[0])
        assert entry.name in found or entry.folders[0] in found
        kinds = ("video tokenizer", "encoder", "upsampler", "guardrail", "decoder")
        part = entry.family.endswith(kinds)
        assert ("does not run" in found) == (not entry.command and not part)
    assert advice("Cosmos-Predict1-7B-Text2Wrold") == (
        "; did you mean Cosmos-Predict1-7B-Text2World?"
    )
    assert advice("my-own-model") == ""
    own = "Cosmos-Predict1-4B-Base_post-trained"
    assert "download" not in advice(own)
    assert "post-training makes of" in advice("Cosmos-Predict1-4B_post-trained")
