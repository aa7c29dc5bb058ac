"""Files appear whole or not at all, and what is no download is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worldline.errors import CheckpointError
from worldline.files import disguise, read_json, replacing, stamp, unfinished


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "frames"

    def full() -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / "0.png").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        full()
    assert not list(tmp_path.iterdir())
    with replacing(path) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [path]


def test_disguise() -> None:
    assert disguise(b"\n<!DOCTYPE html>") == "web page"
    assert disguise(b"version https://git-lfs.github.com/spec/v1\n") == "git-lfs pointer"
    assert disguise(b"PK\x03\x04") == disguise(b"") == ""


def test_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    first = stamp(path)
    assert stamp(tmp_path / "." / "a") == first
    path.write_text("other")
    assert stamp(path) != first


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, "é"]}
    for content, message in (
        (b"{", "cannot be read"),
        (b"\xff\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds no settings, but a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "absent")


def test_unfinished(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert unfinished(tmp_path) == unfinished(tmp_path / "absent") == ""
    (snapshot / "model.part").touch()
    assert "was not finished (model.part): download it again" in unfinished(snapshot)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1.incomplete").touch()
    assert "(1.incomplete, model.part)" in unfinished(snapshot)


def test_needs_no_torch() -> None:
    script = "import sys, worldline.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
