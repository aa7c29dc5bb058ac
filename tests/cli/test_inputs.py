"""A batch is read whole before anything runs, and everything wrong with it is named at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from worldline.cli.inputs import MEDIA, PROMPTS, TYPED_MEDIA, TYPED_TEXT_MEDIA, Lines
from worldline.errors import InputError
from worldline.family import Item
from worldline.inputs import kind_of

from .conftest import Make, Run

OUT = Path("outputs")


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def entry(path: object, **more: object) -> dict[str, Any]:
    return {"visual_input": str(path), **more}


def read(reader: Lines, batch: Path, **stated: Any) -> list[Item]:
    items, problems = reader.read(reader.flags.parse({"batch_input_path": str(batch)}), stated)
    assert not problems
    return items


def read_single(reader: Lines, flags: dict[str, Any], **stated: Any) -> Item:
    [item], problems = reader.read(reader.flags.parse(flags, "--{}".format), stated)
    assert not problems
    return item


# --- what is read


def test_items_are_numbered_by_line(clip: Path, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    text = json.dumps(entry(clip))
    batch.write_bytes(f"\ufeff{text}\r\n\r\n   \r\n{text}\r\n".encode())  # as Windows writes it
    items = read(TYPED_MEDIA, batch)
    assert [(item.input, item.output) for item in items] == [
        (clip, OUT / "0.mp4"),
        (clip, OUT / "3.mp4"),
    ]
    assert [item.label for item in items] == [str(clip)] * 2
    assert items[1].place == f"{batch} line 4 (3.mp4)"


def test_paths_from_here_then_beside_the_file(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, batches = tmp_path / "here", tmp_path / "data" / "assets" / "set"
    for folder, name in ((here, "both.mp4"), (batches, "both.mp4"), (batches, "beside.mp4")):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)
    monkeypatch.chdir(here)
    lines = [entry("both.mp4"), entry("beside.mp4"), entry("assets/set/beside.mp4")]
    found = [item.input for item in read(MEDIA, write_lines(batches / "b.jsonl", *lines))]
    wanted = (here / "both.mp4", batches / "beside.mp4", batches / "beside.mp4")
    for path, other in zip(found, wanted, strict=True):
        assert path is not None
        assert path.samefile(other)


def test_a_folder_is_read_by_name(
    clip: Path, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    for name in ("b.mp4", "a.MP4", ".hidden.mp4"):
        shutil.copy(clip, tmp_path / name)
    shutil.copy(image, tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    items = read(MEDIA, tmp_path)
    assert [(item.output.name, item.input.name, item.kind) for item in items if item.input] == [
        ("0.mp4", "a.MP4", "video"),
        ("1.mp4", "b.mp4", "video"),
        ("2.mp4", "c.png", "image"),
    ]
    assert "notes.txt" in caplog.text


def test_contents_of_a_folder_decide(
    clip: Path, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    shutil.copy(clip, tmp_path / "a.png")
    shutil.copy(image, tmp_path / "b.mp4")
    shutil.copy(clip, tmp_path / "c")
    os.mkfifo(tmp_path / "d")
    (tmp_path / "e.json").write_text("{}")
    assert [(item.input.name, item.kind) for item in read(MEDIA, tmp_path) if item.input] == [
        *(("a.png", "video"), ("b.mp4", "image"), ("c", "video"))
    ]
    assert "skipped: d, e.json" in caplog.text
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    os.mkfifo(wrong / "a.mp4")
    (wrong / "b.webm").symlink_to("nowhere")
    (wrong / "c.gif").write_bytes(b"GIF89a" + bytes(9))
    (wrong / "d.mov").mkdir()
    items, problems = MEDIA.read(MEDIA.flags.parse({"batch_input_path": str(wrong)}), {})
    assert not items
    for problem, name in zip(problems, ("a.mp4", "b.webm", "c.gif", "d.mov"), strict=True):
        assert problem.startswith(str(wrong / name))


def test_prompts(clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "worldline")
    lines = [{"prompt": "a red ball"}, "", {"prompt": "ünïcode", "visual_input": "nowhere.mp4"}]
    items = read(PROMPTS, write_lines(tmp_path / "b.jsonl", *lines), seed=3)
    assert [(item.input, item.stated) for item in items] == [
        (None, {"prompt": "a red ball", "seed": 3}),
        (None, {"prompt": "ünïcode", "seed": 3}),
    ]
    assert "no effect: visual_input" in caplog.text
    batch = write_lines(tmp_path / "c.jsonl", entry(clip), entry(clip, prompt="x"))
    assert [item.stated for item in read(MEDIA, batch)] == [{"prompt": None}, {"prompt": "x"}]
    embedded = {"prompt_embeddings": "y"}
    items = read(TYPED_TEXT_MEDIA, batch, **embedded)
    assert [item.stated for item in items] == [
        {"prompt": prompt, **embedded} for prompt in (None, "x")
    ]
    assert read(TYPED_MEDIA, batch)[1].stated == {}
    assert "no effect: prompt" in caplog.text


@pytest.mark.parametrize("name", ["b.json", "b.jsonl", "b.txt"])
@pytest.mark.parametrize("indent", [None, 1])
def test_documents(name: str, indent: int | None, clip: Path, tmp_path: Path) -> None:
    rows, batch = [entry(clip, prompt="x"), entry(clip, prompt="y")], tmp_path / name
    batch.write_text(json.dumps(rows, indent=indent), encoding="utf-16")
    items = read(MEDIA, batch)
    assert [(item.stated["prompt"], item.output.name) for item in items] == [
        ("x", "0.mp4"),
        ("y", "1.mp4"),
    ]
    assert str(batch) in items[1].place
    assert "2 (1.mp4)" in items[1].place
    batch.write_text(json.dumps(rows[1], indent=indent))
    [item] = read(PROMPTS, batch)
    assert (item.stated, item.output) == ({"prompt": "y"}, OUT / "0.mp4")


def test_single(clip: Path) -> None:
    flags = {"input_image_or_video_path": str(clip), "video_save_name": "a.b"}
    item = read_single(MEDIA, flags, prompt="x")
    assert (item.input, item.kind, item.output) == (clip, "video", OUT / "a.b.mp4")
    for suffix in (".webm", ".GIF"):
        item = read_single(MEDIA, {**flags, "video_save_name": f"a{suffix}"})
        assert item.output == OUT / f"a{suffix}"
    item = read_single(PROMPTS, {"video_save_folder": "x"}, prompt="a  red\nball")
    assert (item.label, item.place, item.output) == ("“a red ball”", "", Path("x/output.mp4"))
    assert len(read_single(PROMPTS, {}, prompt="ball " * 99).label) < 50


# --- what is refused


def test_all_problems_at_once(
    base: Make,
    clip: Path,
    short_clip: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # short paths, so that no line is cut
    for path in (short_clip, image):
        shutil.copy(path, path.name)
    short_clip, image, fake, cut = map(Path, (short_clip.name, image.name, "fake.mp4", "cut.mp4"))
    fake.write_text("not a video\n")
    cut.write_bytes(clip.read_bytes()[:2000])
    lines: list[tuple[object, str]] = [
        (entry(clip), ""),
        ('{"visual_input": ', "not JSON"),
        ("[1]", "not an object; give one with visual_input"),
        ({"prompt": "x"}, 'no "visual_input"'),
        (entry("nowhere.mp4"), "nowhere.mp4: no such file"),
        ("", ""),
        (entry(fake), "not an mp4, mov, mkv, webm or gif video but a text"),
        (entry(cut), "truncated"),
        (entry(short_clip), "5 frames, num_input_frames is 9"),
        (entry(image), "--input_type image"),
        ({"visual_input": 7}, '"visual_input" is 7'),
        (entry(""), "is a directory"),
        (entry("x.txt"), "x.txt: no such file"),
    ]
    batch = write_lines(Path("b.jsonl"), *(line for line, _ in lines))
    result = base("--batch_input_path", batch)
    assert result.exit_code == 2
    check_lines(result.stderr, batch, [part for _, part in lines])


def test_all_problems_with_prompts_at_once(
    ar_video2world: Make, clip: Path, image: Path, tmp_path: Path
) -> None:
    lines: list[tuple[object, str]] = [
        (entry(clip, prompt="x"), ""),
        (entry(clip), 'no "prompt"'),
        ({"prompt": "x"}, 'no "visual_input"'),
        ({}, 'no "visual_input", no "prompt"'),
        (entry(clip, prompt=" \n"), "prompt: it is empty"),
        (entry(clip, prompt=7), '"prompt" is 7'),
        (entry(clip, prompt="a \ud800 b"), "as a unicode string"),
        (entry(image, prompt="x"), "--input_type text_and_image"),
        ([], "not an object; give one with visual_input and prompt"),
    ]
    batch = write_lines(tmp_path / "b.jsonl", *(line for line, _ in lines))
    result = ar_video2world("--batch_input_path", batch)
    assert result.exit_code == 2
    check_lines(result.stderr, batch, [part for _, part in lines])


def problems_of(reader: Lines, batch: Path) -> list[str]:
    items, problems = reader.read(reader.flags.parse({"batch_input_path": str(batch)}), {})
    assert not items
    return problems


def test_fields_of_other_releases_and_names_that_stand_twice(tmp_path: Path) -> None:
    rows = [{"input_video": "a.mp4", "prompt": "x", "output_video": "o.mp4"}]
    batch = write_lines(tmp_path / "b.json", json.dumps(rows, indent=2))
    [problem] = problems_of(TYPED_TEXT_MEDIA, batch)
    assert problem.startswith(f"{batch} item 1 (0.mp4): ")
    assert 'no "visual_input"; rename "input_video"' in problem
    batch = write_lines(tmp_path / "b.jsonl", "", '{"prompt": "x", "a": {"c": 1, "c": 2}}')
    [problem] = problems_of(PROMPTS, batch)
    assert problem.startswith(f"{batch} line 2 (1.mp4): ")
    assert "'c' stands there twice" in problem


def test_rows_that_name_no_file(run: Run, tmp_path: Path) -> None:
    names = [
        "https://x.org/a.mp4",
        "file:///a.mp4",
        "a\0b.mp4",
        "a\udc80\ud800b.mp4",
        "~nobody/a.mp4",
    ]
    batch = write_lines(tmp_path / "b.jsonl", *map(entry, names))
    problems = problems_of(MEDIA, batch)
    assert [problem.count("URLs") for problem in problems] == [1, 1, 0, 0, 0]
    for number, problem in enumerate(problems):
        assert problem.startswith(f"{batch} line {number + 1} ({number}.mp4): ")
    for name in (*names[:2], Path(names[0]), *names[2:4]):
        with pytest.raises(InputError):  # in Python
            kind_of(name)
    for words in (["evaluate"], ["checkpoints", "inspect"], ["tokenize", "encode"]):
        result = run(*words, names[0])
        assert (result.exit_code, result.stderr.count("URLs")) == (2, 1)


def test_ten_thousand_wrong_rows(base: Make, tmp_path: Path) -> None:
    batch = write_lines(tmp_path / "b.jsonl", *(entry(f"{n}\x1b[2J.mp4") for n in range(10_000)))
    result = base("--batch_input_path", batch)
    assert result.exit_code == 2
    assert len(result.stderr) < 2000
    assert "b.jsonl line 1 (0.mp4): 0\\x1b[2J.mp4" in result.stderr
    *rows, last = result.stderr.splitlines()
    assert last == f"and {1000 - len(rows)} more"


def check_lines(stderr: str, batch: Path, parts: list[str]) -> None:
    """Fail unless each wrong line of a batch, and no other, has its own line."""
    found = stderr.split("worldline: ")[-1].splitlines()
    assert len(found) == len([part for part in parts if part]), stderr
    for number, part in enumerate(parts):
        place = f"{batch} line {number + 1} ({number}.mp4)"
        named = [line for line in found if line.startswith((f"{place}:", f"{place},"))]
        assert [part in line for line in named] == ([True] if part else []), (part, named)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "has no input"),
        (b"\n \n", "has no input"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "No such file"),
        (b'[{"prompt": "x"},\n{]', "line 2"),
        (b"\x89PNG\r\n\x1a\n\x00\x80", "not UTF-8"),
        ("folder", "has no input"),
    ],
)
def test_nothing_to_read(content: bytes | str | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError, match=part) as caught:
        read(MEDIA, path)
    assert str(path) in str(caught.value)


def test_a_folder_holds_no_prompts(tmp_path: Path) -> None:
    for reader in (PROMPTS, TYPED_TEXT_MEDIA):
        with pytest.raises(InputError, match="give a JSONL"):
            read(reader, tmp_path)


@pytest.mark.parametrize(
    ("reader", "flags", "stated", "part"),
    [
        (PROMPTS, {}, {}, "no prompt; give --prompt"),
        (PROMPTS, {"batch_input_path": "x"}, {"prompt": "y"}, "exclude each other"),
        (PROMPTS, {"batch_input_path": "x"}, {"prompt_embeddings": "y"}, "exclude each other"),
        (TYPED_TEXT_MEDIA, {"input_image_or_video_path": "a.mp4"}, {}, "no prompt; give --prompt"),
        (MEDIA, {"input_image_or_video_path": "a.txt"}, {}, "a.txt: no such file"),
        (MEDIA, {"input_image_or_video_path": "a.mp4", "video_save_name": "/"}, {}, "save_name"),
        (MEDIA, {"resume": 1}, {}, "--resume is 1"),
        *(
            (MEDIA, {name: url}, {}, f"--{name}: {url[:9]}.*URLs")
            for name in ("input_image_or_video_path", "batch_input_path")
            for url in ("https://x.org/a.mp4", "s3://b/a.mp4", "data:image/png;base64,aa")
        ),
    ],
)
def test_refused_flags(
    reader: Lines, flags: dict[str, Any], stated: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        read_single(reader, flags, **stated)
