"""Models are found in the hub's default cache, as below the checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worldline.catalog import ENTRIES, FLOW_MODELS
from worldline.errors import CheckpointError, InputError
from worldline.locate import locate
from worldline.opening import open_world
from worldline.repositories import hub_cache, model_name, snapshots

from .conftest import MODEL, TOKENIZER
from .tiny_diffusion import TEXT2WORLD

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def keep(folder: Path, cache: Path, repository: str, commit: str = COMMIT) -> Path:
    """Copy a repository as huggingface_hub keeps it: links to blobs; its snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            blob = home / "blobs" / f"{commit}-{path.name}-{path.stat().st_size}"
            blob.write_bytes(path.read_bytes())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache below HF_HOME."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert hub_cache() == Path("/h/.cache/huggingface/hub")
    for name, place in zip(names[::-1], ("huggingface/hub", "hub", "", ""), strict=True):
        monkeypatch.setenv(name, f"~/{name}")
        assert hub_cache() == Path("/h", name, place)


@pytest.mark.parametrize("family", ["autoregressive", "diffusion", "predict2.5"])
def test_every_part_in_the_cache(
    family: str,
    cache: Path,
    tmp_path: Path,
    whole_world: Path,
    tiny_diffusion: Path,
    tiny_predict2_5: Path,
) -> None:
    root, name, flow = {
        "autoregressive": (whole_world, MODEL, ""),
        "diffusion": (tiny_diffusion, TEXT2WORLD, ""),
        "predict2.5": (tiny_predict2_5, FLOW_MODELS[1].name, FLOW_MODELS[1].revision),
    }[family]
    for path in (*root.iterdir(), *root.glob("*/*")):
        owner = "nvidia" if path.parent == root else path.parent.name
        if path.is_dir() and any(path.glob("*.*")):
            keep(path, cache, f"{owner}/{path.name}", flow or COMMIT)
    opened = open_world(locate(name, tmp_path / "no checkpoints"), {})
    beside = open_world(locate(name, root), {})
    assert (opened.name, opened.family, opened.missing) == (name, beside.family, beside.missing)
    assert opened.parts.keys() == beside.parts.keys()
    assert all(path.is_relative_to(cache) for part in opened.parts.values() for path in part.files)
    # the checkpoint folder comes first, a whole name and a snapshot's own path will do
    assert locate(name, root).folder.is_relative_to(root)
    if not flow:
        for other in (f"nvidia/{name}", opened.folder, opened.folder.parent.parent):
            assert locate(other, tmp_path).folder == opened.folder
    [entry] = [e for e in ENTRIES if name in (e.name, *(model.name for model in e.models))]
    assert entry.presence(tmp_path) == ("partial", snapshots(cache, entry.name)[0])  # of tiny sizes


def test_which_snapshot(cache: Path, small_world: Path, tmp_path: Path) -> None:
    old, new, bare = (
        keep(folder, cache, f"nvidia/{TOKENIZER}", commit)
        for folder, commit in (
            (small_world / TOKENIZER, "old"),
            (small_world / TOKENIZER, "new"),
            (small_world / MODEL, "bare"),
        )
    )
    for age, path in enumerate((bare, new, old)):
        os.utime(path, (10**9 - age, 10**9 - age))
    for file in bare.glob("*.pt"):
        file.resolve().unlink()  # a link without its blob
    home = old.parent.parent
    assert snapshots(cache, TOKENIZER) == [new, old, bare]
    assert snapshots(cache, f"nvidia/{TOKENIZER}", "old") == [old, new, bare]
    assert snapshots(cache, f"other/{TOKENIZER}") == []
    (home / "refs").mkdir()
    for commit, first in (("old", old), ("bare", new), ("gone", new)):
        (home / "refs" / "main").write_text(commit)
        assert snapshots(cache, TOKENIZER)[0] == first
    assert model_name(old) == TOKENIZER
    assert locate(TOKENIZER, tmp_path, tokenizer=True).folder == new


def test_an_unfinished_snapshot_is_named(cache: Path, small_world: Path, tmp_path: Path) -> None:
    snapshot = keep(small_world / MODEL, cache, f"nvidia/{MODEL}")
    (snapshot / "model.pt").unlink()
    (snapshot.parent.parent / "blobs" / "77.incomplete").touch()
    with pytest.raises(CheckpointError, match=rf"{COMMIT} .*not finished \(77\.incomplete\)"):
        open_world(locate(MODEL, tmp_path), {})


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "https://huggingface.co/nvidia/x"])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    for place in ((name, tmp_path), ("model", name)):
        with pytest.raises(InputError):
            locate(*place)
