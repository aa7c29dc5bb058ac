"""Every known checkpoint is listed, with its state on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import worldline.locate
from worldline import memory
from worldline.catalog import ENTRIES

from ..conftest import MODEL, TOKENIZER
from ..tiny_diffusion import CONTINUOUS, VIDEO2WORLD
from .conftest import Run

NBYTES = 8_028_176_384  # of the released 4B model


def test_table(
    run: Run, own_world: Path, small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.locate, "BUNDLED", small_world)
    (own_world / TOKENIZER / "decoder.safetensors").unlink()
    os.truncate(own_world / MODEL / "model.pt", NBYTES)
    result = run("models", "--checkpoint_dir", own_world)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1].startswith(f"tiny-{MODEL} ")  # bundled ones come first
    assert lines[2].startswith(f"tiny-{TOKENIZER} ")
    assert len(lines) == 3 + len(ENTRIES)
    state = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert state[f"tiny-{MODEL}"] == "bundled"
    assert state[MODEL] == "present"
    assert state[TOKENIZER] == "partial"
    assert state["Cosmos-Predict1-12B"] == "absent"
    assert all(word in lines[0] for word in ("folder", "memory", "command", "licence", "files"))
    assert " generate " in lines[1]
    assert "tokenize" in lines[2]


def test_json(run: Run, own_world: Path) -> None:
    os.truncate(own_world / MODEL / "model.pt", NBYTES)
    (own_world / MODEL).rename(own_world / "Cosmos-1.0-Autoregressive-4B")
    result = run("models", "--checkpoint-dir", own_world, "--json", "--device", "cpu")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows[MODEL]["state"] == "present"
    assert rows[MODEL]["folder"] == "Cosmos-1.0-Autoregressive-4B"
    assert rows[MODEL]["files"][0]["md5"] == "5fdc62fc87fbf470dbcc2288589b7942"
    assert rows[MODEL]["memory"] > 2 * rows[MODEL]["nbytes"]  # float32 on a CPU
    flow, large = (rows[f"Cosmos-Predict2.5-{size}"] for size in ("2B", "14B"))
    assert (flow["command"], large["command"]) == ("predict2.5", "predict2.5")
    assert flow["memory"] > 4 * (flow["parameters"] + 7_000_000_000)  # with Reason1
    assert large["memory"] > flow["memory"]
    assert rows["Cosmos-Reason1-7B"]["runs_here"] == "as a part"


def test_diffusion_worlds(run: Run, bundled_diffusion: object, diffusion_worlds: Path) -> None:
    result = run("models", "--checkpoint_dir", diffusion_worlds, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    rows = {row["folder"]: row for row in json.loads(result.stdout)}
    tiny = rows[f"tiny-{VIDEO2WORLD}"]
    assert (tiny["state"], tiny["command"]) == ("bundled", "generate")
    names = [file["name"] for file in tiny["files"]]
    halves = [f"{half}.safetensors" for half in ("decoder", "encoder")]
    assert names == ["model.pt", *halves, "mean_std.pt", "model.safetensors"]
    assert 0 < tiny["nbytes"] < tiny["memory"]
    tokenizer = rows[f"tiny-{CONTINUOUS}"]
    assert (tokenizer["state"], tokenizer["command"]) == ("bundled", "tokenize")
    assert tokenizer["family"] in rows[CONTINUOUS]["family"]
    assert 0 < tokenizer["nbytes"] < tiny["nbytes"]
    row = rows["Cosmos-Predict1-7B-Text2World"]
    assert row["command"] == "diffusion text2world"
    assert row["memory"] > 4 * (row["parameters"] + 4_000_000_000)  # float32, with T5-11B
    assert rows["Cosmos-Predict1-14B-Video2World"]["memory"] > row["memory"]
    assert rows["Cosmos-Tokenize1-CV8x8x8-720p"]["command"] == "tokenize"
    assert rows["google-t5/t5-11b"]["runs_here"] == "as a part"
    assert rows["Pixtral-12B"]["runs_here"] == "as a part"


def test_no_checkpoint_folder(run: Run) -> None:
    result = run("models", "--checkpoint_dir", "nowhere")
    assert result.exit_code == 0
    assert "no folder nowhere" in result.stderr


def test_autoregressive_worlds_with_their_parts(
    run: Run, small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory.Memory(10**12, 10**12)
    monkeypatch.setattr(memory, "host_memory", lambda: free)
    words = ("models", "--checkpoint_dir", small_world, "--json", "--device", "cpu")
    rows = {row["name"]: row for row in json.loads(run(*words).stdout)}
    row = rows["Cosmos-Predict1-5B-Video2World"]
    assert row["command"] == "autoregressive video2world"
    decoder = rows["Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"]
    assert decoder["command"] == ""
    assert decoder["runs_here"] == "as a part"
    # float32: the model itself, its decoder, T5-11B
    assert row["memory"] > 4 * (row["parameters"] + decoder["parameters"] + 4_000_000_000)
    # a host that holds the model, but not its decoder beside it
    free = memory.Memory(30_000_000_000, 32_000_000_000)
    monkeypatch.setattr(memory, "host_memory", lambda: free)
    rows = {row["name"]: row for row in json.loads(run(*words).stdout)}
    assert rows["Cosmos-Predict1-4B"]["runs_here"] == "yes --disable_diffusion_decoder"
