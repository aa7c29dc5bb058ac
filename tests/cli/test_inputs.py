"""A batch is read whole before anything runs, and everything wrong with it is told at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from worldline.cli.inputs import Item, read_batch, read_single
from worldline.errors import InputError


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def entry(path: object) -> dict[str, str]:
    return {"visual_input": str(path)}


def test_items_are_numbered_by_line(clip: Path, tmp_path: Path) -> None:
    batch = write_lines(tmp_path / "b.jsonl", entry(clip), "", "   ", entry(clip))
    assert read_batch(batch, "video", 9) == [Item(0, clip), Item(3, clip)]


def test_byte_order_mark_and_windows_line_ends(clip: Path, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    batch.write_bytes(b"\xef\xbb\xbf" + json.dumps(entry(clip)).encode() + b"\r\n")
    assert [item.path for item in read_batch(batch, "video", 9)] == [clip]


def test_paths_from_here_then_beside_the_file(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    batches = tmp_path / "data" / "assets" / "set"
    for folder, name in ((here, "both.mp4"), (batches, "both.mp4"), (batches, "beside.mp4")):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)
    monkeypatch.chdir(here)
    lines = [entry("both.mp4"), entry("beside.mp4"), entry("assets/set/beside.mp4")]
    items = read_batch(write_lines(batches / "b.jsonl", *lines), "video", 9)
    assert items[0].path.samefile(here / "both.mp4")
    assert items[1].path.samefile(batches / "beside.mp4")
    assert items[2].path.samefile(batches / "beside.mp4")


def test_all_problems_at_once(clip: Path, short_clip: Path, image: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("not a video\n")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:2000])
    lines: list[tuple[object, str]] = [
        (entry(clip), ""),
        ('{"visual_input": ', "not JSON"),
        ("[1]", "not an object"),
        ({"prompt": "x"}, "assets/autoregressive/batch_inputs/base.jsonl"),
        (entry("nowhere.mp4"), "nowhere.mp4: no such file"),
        ("", ""),
        (entry(fake), "not an mp4, mov, mkv, webm or gif video but text"),
        (entry(cut), "truncated"),
        (entry(short_clip), "has 5 frames, but --num_input_frames is 9"),
        (entry(image), "--input_type is video; use --input_type image"),
        ({"visual_input": 7}, "must be the path of a file, not 7"),
        (entry(tmp_path / "x.mp4"), "x.mp4: no such file"),
        (entry(tmp_path / "x.txt"), "unknown media type .txt"),
    ]
    batch = write_lines(tmp_path / "b.jsonl", *(line for line, _ in lines))
    with pytest.raises(InputError) as caught:
        read_batch(batch, "video", 9)
    message = str(caught.value).splitlines()
    assert message[0] == f"{batch}: 11 of 12 inputs cannot be used, so none was run"
    told = dict(line.strip().removeprefix("line ").split(": ", 1) for line in message[1:])
    wrong = {str(n): part for n, (_, part) in enumerate(lines, 1) if part}
    assert told.keys() == wrong.keys()
    for number, part in wrong.items():
        assert part in told[number], f"line {number}: {told[number]}"


def test_fields_without_effect_are_named(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    read_batch(write_lines(tmp_path / "b.jsonl", {**entry(clip), "prompt": "x"}), "video", 9)
    assert "no effect on a base model: prompt" in caplog.text


def test_a_folder_is_read_by_name(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    for name in ("b.mp4", "a.MP4", "c.mp4", ".hidden.mp4"):
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    items = read_batch(tmp_path, "video", 9)
    assert [(item.number, item.path.name) for item in items] == [
        (0, "a.MP4"),
        (1, "b.mp4"),
        (2, "c.mp4"),
    ]
    assert "passed over: notes.txt" in caplog.text


def test_a_folder_with_the_wrong_kind(clip: Path, image: Path, tmp_path: Path) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    shutil.copy(image, tmp_path / "b.png")
    with pytest.raises(InputError, match=r"1 of 2 inputs.*\n.*b\.png is an image"):
        read_batch(tmp_path, "video", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line with an input"),
        (b"\n \n", "has no line with an input"),
        (b"\xff\xfe\x00", "is not text"),
        (None, "no such file or folder"),
    ],
)
def test_nothing_to_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_batch(path, "video", 9)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no media"):
        read_batch(tmp_path, "video", 9)


def test_single(clip: Path, short_clip: Path) -> None:
    assert read_single(str(clip), "video", 9) == Item(0, clip)
    assert read_single(short_clip, "video", 1).path == short_clip
    with pytest.raises(InputError, match="has 5 frames, but --num_input_frames is 9"):
        read_single(short_clip, "video", 9)
