"""Files appear whole or not at all, and what is no download is named."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worldline import files
from worldline.documents import parse_json, read_entries, read_json, read_text
from worldline.errors import CheckpointError
from worldline.files import digest, disguise, file_name, replacing, replacing_all, stamp
from worldline.repositories import unfinished


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


def test_files_take_their_places_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "a.mp4"]

    def half() -> None:
        with replacing_all(paths) as (report, _):
            report.write_text("new")  # the second was not written

    with pytest.raises(FileNotFoundError):
        half()
    assert [path.name for path in tmp_path.iterdir()] in ([], ["a.json"])


def test_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    whole = hashlib.sha256(bytes(1000)).hexdigest()
    assert digest(path) == digest(path, sampled=True) == whole
    for name, size in (("_BLOCK", 50), ("_NUM_BLOCKS", 5)):
        monkeypatch.setattr(files, name, size)
    of_zeros = digest(path, sampled=True)
    for index in (0, 49, 240, 480, 950, 999):  # in a block
        path.write_bytes(bytes(index) + b"1" + bytes(999 - index))
        os.utime(path, ns=(1, 1))
        assert digest(path) != whole
        assert digest(path, sampled=True) != of_zeros, index
    path.write_bytes(bytes(1001))
    assert digest(path, sampled=True) != of_zeros


def test_digest_of_a_folder(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "1.png").write_bytes(b"1")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    (tmp_path / "b" / "inner" / "1.png").rename(tmp_path / "b" / "inner" / "2.png")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


@pytest.mark.parametrize("name", ["", ".", "..", " ", "/", "a/b", "../a", "a\\b", "a\0b", "a\n"])
def test_names_that_are_paths(name: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        file_name(name)


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
    script = "import sys, worldline.documents, worldline.locate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "'b' .*twice"),
        ("[" * 150 + "]" * 150, "100 deep"),
        ("[" * 200_000, "100 deep"),
        (f"[{'9' * 9999}]", "9999 digits"),
        ('{"a": 1,\n "b": 2,\n}', "line 3"),
    ],
)
def test_json_that_is_refused(text: str, mentioned: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentioned):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{mentioned}"):
        read_json(tmp_path / "config.json")


def test_texts_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        path.write_bytes('{"a": "é"}\r\n'.encode(encoding))
        assert read_json(path) == {"a": "é"}
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular file"), (".", "a folder"), ("gone", "No such")):
        with pytest.raises(CheckpointError, match=reason):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="larger than 5 B"):
        read_text(path, 5)


def test_entries_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = {"a": 1}, {"b": [2]}
    lines = f"\ufeff{json.dumps(one)}\r\n\n// both\n{json.dumps(two)}"
    by_line = [("line", 1, one), ("line", 4, two)]
    for suffix in (".jsonl", ".json", ".txt", ""):
        path = tmp_path / f"x{suffix}"
        for text, entries in (
            (lines, by_line),
            (json.dumps([one, two], indent=1), [("item", 1, one), ("item", 2, two)]),
            (json.dumps([one, two]), [("item", 1, one), ("item", 2, two)]),
            (json.dumps(two, indent=1), [("", 1, two)]),
            (json.dumps(one), [("line" if suffix == ".jsonl" else "", 1, one)]),
        ):
            path.write_text(text)
            assert [*read_entries(path)] == entries
    monkeypatch.setattr("worldline.documents.MAX_ENTRIES", 2)
    for text in ("[1, 2, 3]", json.dumps({"a": 1, "b": 2, "c": 3}), "{}\n" * 3):
        path.write_text(text)
        with pytest.raises(ValueError, match="more than 2 entries"):
            [*read_entries(path)]
    for text, reason in (('[{"a": 1},\n', "line 2"), (" \n", "no input"), ("// x", "no input")):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            [*read_entries(path)]
    path = tmp_path / "x.jsonl"
    path.write_text('{"a":\n{"a": 1}')
    (_, _, broken), whole = read_entries(path)
    assert isinstance(broken, ValueError)
    assert whole == ("line", 2, one)
