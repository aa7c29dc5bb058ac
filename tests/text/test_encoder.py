"""Text encoders behind their cache; kept embeddings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tiny.encoders import export_t5, new_t5
from worldline.errors import CheckpointError
from worldline.repositories import released_folders
from worldline.text.encoder import EmbeddingCache, TextEncoder, cache_folder
from worldline.text.t5 import T5Files
from worldline.weights.checkpoint import open_checkpoint, save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found_again_by_another_process(tmp_path: Path, dtype: torch.dtype) -> None:
    embedding = torch.randn(1, 5, 3).to(dtype)
    EmbeddingCache(tmp_path / "made").put("model", "a ball", embedding)
    found = EmbeddingCache(tmp_path / "made").get("model", "a ball")
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, embedding)


def test_different_keys_are_different_entries(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    keys = [("m", "ab"), ("ma", "b"), ("m", "a b"), ("m", ""), ("", "m"), ("m", "\ud800")]
    for number, (model, text) in enumerate(keys):
        cache.put(model, text, torch.full((1,), number))
    for number, (model, text) in enumerate(keys):
        assert cache.get(model, text) == number
    assert cache.get("other", "ab") is None


def test_prompts_are_not_written_down(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put("model", "a secret plan", torch.zeros(1))
    [path] = tmp_path.iterdir()
    assert "secret" not in path.name
    assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"short"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put("model", "a ball", torch.ones(2))
    path = cache.path("model", "a ball")
    path.write_bytes(damage or path.read_bytes()[:-3])
    assert cache.get("model", "a ball") is None
    cache.put("model", "a ball", torch.ones(2))
    assert torch.equal(cache.get("model", "a ball"), torch.ones(2))  # type: ignore[arg-type]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def _another_prompts(path: Path) -> None:
    EmbeddingCache(path.parent).put("model", "a tree", torch.zeros(1, 5, 3))
    EmbeddingCache(path.parent).path("model", "a tree").replace(path)


def _another_models(path: Path) -> None:
    EmbeddingCache(path.parent).put("model 2", "a ball", torch.zeros(1, 5, 3))
    EmbeddingCache(path.parent).path("model 2", "a ball").replace(path)


def _holding(tensor: torch.Tensor, name: str = "embedding") -> Callable[[Path], None]:
    """Writer of a tensor beside the metadata of the entry that it replaces."""

    def write(path: Path) -> None:
        save({name: tensor}, path, open_checkpoint(path).metadata)

    return write


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _another_prompts,
        _another_models,
        _holding(torch.full((1, 5, 3), torch.nan)),
        _holding(torch.ones(1, 1, 3)),
        _holding(torch.ones(1, 3, 5)),
        _holding(torch.ones(1, 5, 3, dtype=torch.int32)),
        _holding(torch.ones(1, 5, 3, dtype=torch.float16)),
        _holding(torch.ones(1, 5, 3), "other"),
        _loop,
        _folder,
        _fifo,
    ],
)
def test_an_entry_that_is_something_else(
    damage: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    """It is not used, and what is written in its place is."""
    cache, embedding = EmbeddingCache(tmp_path), torch.full((1, 5, 3), 0.5).to(dtype)
    cache.put("model", "a ball", embedding)
    damage(cache.path("model", "a ball"))
    assert cache.get("model", "a ball") is None
    cache.put("model", "a ball", embedding)
    found = cache.get("model", "a ball")
    assert found is not None
    assert torch.equal(found, embedding)


def test_entries_have_the_mode_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    cache = EmbeddingCache(tmp_path / "made")
    cache.put("model", "a ball", torch.ones(2))
    mode = cache.path("model", "a ball").stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode


def test_writers_at_once(tmp_path: Path) -> None:
    cache, embedding = EmbeddingCache(tmp_path, largest=9), torch.rand(1, 50, 3)

    def write(_: int) -> bool:
        cache.put("model", "a ball", embedding)
        found = cache.get("model", "a ball")
        return found is not None and torch.equal(found, embedding)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(40)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_files_of_killed_writers_are_counted(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, largest=2)
    for number in range(4):
        stale = tmp_path / f".{number}.safetensors.77-ab.tmp"
        stale.touch()
        os.utime(stale, (number, number))
    cache.put("model", "a ball", torch.ones(2))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".3.safetensors.77-ab.tmp",
        cache.path("model", "a ball").name,
    }


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # even root cannot make a folder below a file
    cache = EmbeddingCache(tmp_path / "file" / "embeddings")
    cache.put("model", "a ball", torch.ones(2))
    assert cache.get("model", "a ball") is None


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    EmbeddingCache(tmp_path).put("model", "a ball", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_the_entry_unused_for_longest_goes_first(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, largest=3)
    for number in range(3):
        cache.put("model", str(number), torch.ones(1))
        os.utime(cache.path("model", str(number)), (number, number))
    assert cache.get("model", "0") is not None  # used now
    cache.put("model", "3", torch.ones(1))
    assert [cache.get("model", str(number)) is not None for number in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path))
    assert EmbeddingCache().folder == tmp_path / "embeddings"
    monkeypatch.delenv("WORLDLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "worldline" / "embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "worldline" / "embeddings"


# --- encoders behind a cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path / "cache"))
    export_t5(new_t5(max_length=16), tmp_path / "t5")
    return tmp_path / "t5"


def encoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder(T5Files.open(folder), torch.device("cpu"), dtype, offload=True)


def test_weights_are_read_at_the_first_unknown_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoder_of(folder).embed(["a ball", "", "a ball"])
    assert list(first) == ["a ball", ""]
    expected = T5Files.open(folder).read("cpu", torch.float32).encode(["a ball"])
    assert torch.equal(first["a ball"], expected)
    monkeypatch.setattr("worldline.text.encoder.load_into", None)
    assert torch.equal(encoder_of(folder).embed(["a ball"])["a ball"], expected)
    for other in (encoder_of(folder, torch.bfloat16), encoder_of(folder)):
        with pytest.raises(TypeError):
            other.embed(["a ball" if other.dtype == torch.bfloat16 else "another"])


def test_a_truncated_prompt_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, long = encoder_of(folder), "x" * 20
    cut = encoder.truncations({"prompt": long, "negative_prompt": "short"})
    assert cut == {"prompt": {"max_length": 16, "num_truncated_tokens": 5}}
    [warning] = caplog.messages
    assert "21 tokens" in warning
    assert "16" in warning


def test_the_first_folder_that_fits(folder: Path, tmp_path: Path) -> None:
    """Snapshots in a hub cache come before a folder of the last name, `main` before the others."""
    cache = tmp_path / "models--google-t5--t5-11b"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("aaa\n")
    for revision in ("aaa", "bbb"):
        shutil.copytree(folder, cache / "snapshots" / revision)
    export_t5(new_t5({"d_model": 32}), tmp_path / "google-t5" / "t5-11b")
    shutil.copytree(folder, tmp_path / "t5-11b")
    place = SimpleNamespace(roots=[tmp_path / "nowhere", tmp_path], searched="here")
    options = SimpleNamespace(text_encoder_dir=None)
    opened = SimpleNamespace(place=place, options=options, folder=tmp_path / "world")
    assert T5Files.find(opened, 64).folder == cache / "snapshots" / "aaa"
    other = released_folders(tmp_path, T5Files.released, "bbb")
    assert [path.name for path in other] == ["t5-11b", "bbb", "aaa", "t5-11b"]
    assert T5Files.find(opened, 32).folder == tmp_path / "google-t5" / "t5-11b"
    with pytest.raises(CheckpointError, match=r"t5-11b has width 32, .* 5"):
        T5Files.find(opened, 5)
    place.roots.pop()
    with pytest.raises(CheckpointError, match="no text encoder google-t5/t5-11b in here"):
        T5Files.find(opened, 64)
