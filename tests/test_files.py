"""Files appear whole or not at all, and what is no download is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worldline.files import disguise, replacing, stamp


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


def test_needs_no_torch() -> None:
    script = "import sys, worldline.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
