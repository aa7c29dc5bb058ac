"""A batch is read whole before anything runs, and everything wrong with it is told at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from worldline.cli.inputs import Fields, Item, read_batch, read_single
from worldline.errors import InputError

CLIPS = Fields("video", 9)


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


def entry(path: object) -> dict[str, str]:
    return {"visual_input": str(path)}


def test_items_are_numbered_by_line(clip: Path, tmp_path: Path) -> None:
    batch = write_lines(tmp_path / "b.jsonl", entry(clip), "", "   ", entry(clip))
    assert read_batch(batch, CLIPS) == [Item(0, clip), Item(3, clip)]


def test_byte_order_mark_and_windows_line_ends(clip: Path, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    batch.write_bytes(b"\xef\xbb\xbf" + json.dumps(entry(clip)).encode() + b"\r\n")
    assert [item.path for item in read_batch(batch, CLIPS)] == [clip]


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
    items = read_batch(write_lines(batches / "b.jsonl", *lines), CLIPS)
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
        read_batch(batch, CLIPS)
    message = str(caught.value).splitlines()
    assert message[0] == f"{batch}: 11 of 12 inputs cannot be used, so none was run"
    told = dict(line.strip().removeprefix("line ").split(": ", 1) for line in message[1:])
    wrong = {str(n + 1): (part, n) for n, (_, part) in enumerate(lines) if part}
    assert told.keys() == wrong.keys()
    for number, (part, output) in wrong.items():
        assert part in told[number], f"line {number}: {told[number]}"
        assert told[number].endswith(f" (output {output}.mp4)")


def test_fields_without_effect_are_named(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    read_batch(write_lines(tmp_path / "b.jsonl", {**entry(clip), "prompt": "x"}), CLIPS)
    assert "no effect on a base model: prompt" in caplog.text


def test_a_folder_is_read_by_name(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worldline")
    for name in ("b.mp4", "a.MP4", "c.mp4", ".hidden.mp4"):
        shutil.copy(clip, tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "more").mkdir()
    items = read_batch(tmp_path, CLIPS)
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
        read_batch(tmp_path, CLIPS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line with an input"),
        (b"\n \n", "has no line with an input"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "no such file or folder"),
    ],
)
def test_nothing_to_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_batch(path, CLIPS)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no media"):
        read_batch(tmp_path, CLIPS)


def test_single(clip: Path, short_clip: Path) -> None:
    assert read_single(str(clip), CLIPS) == Item(0, clip)
    assert read_single(short_clip, Fields("video", 1)).path == short_clip
    with pytest.raises(InputError, match="has 5 frames, but --num_input_frames is 9"):
        read_single(short_clip, CLIPS)


# --- lines with prompts

PROMPTS = Fields(None, prompt="required", model="Text2World model", example="example.jsonl")
BOTH = Fields("either", 9, prompt="required", model="Video2World model", example="example.jsonl")


def test_prompts_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "worldline")
    lines = [{"prompt": "a red ball"}, "", {"prompt": "ünïcode", "visual_input": "nowhere.mp4"}]
    batch = write_lines(tmp_path / "b.jsonl", *lines)
    assert read_batch(batch, PROMPTS) == [
        Item(0, None, "a red ball"),
        Item(2, None, "ünïcode"),
    ]
    assert "no effect on a Text2World model: visual_input" in caplog.text


def test_all_problems_with_prompts_at_once(clip: Path, image: Path, tmp_path: Path) -> None:
    lines: list[tuple[object, str]] = [
        ({**entry(clip), "prompt": "x"}, ""),
        (entry(clip), 'no "prompt"; a line is like {'),
        ({"prompt": "x"}, 'no "visual_input"; a line is like {'),
        ({}, 'no "visual_input" and no "prompt"'),
        ({**entry(clip), "prompt": " \n"}, '"prompt" is empty'),
        ({**entry(clip), "prompt": 7}, '"prompt" must be a text, not 7'),
        ({**entry(clip), "prompt": "a \ud800 b"}, '"prompt" is no valid text'),
        ({**entry(image), "prompt": "x"}, "is an image, which has 1 frame, but --num_input_frames"),
        ([], 'not an object like {"visual_input": "in.mp4", "prompt": '),
    ]
    batch = write_lines(tmp_path / "b.jsonl", *(line for line, _ in lines))
    with pytest.raises(InputError) as caught:
        read_batch(batch, BOTH)
    message = str(caught.value).splitlines()
    assert message[0].endswith("8 of 9 inputs cannot be used, so none was run")
    assert len(message) == 9
    for told, (_, part) in zip(message[1:], lines[1:], strict=True):
        assert part in told


def test_either_kind(clip: Path, image: Path, tmp_path: Path) -> None:
    lines = ({**entry(path), "prompt": "x"} for path in (clip, image))
    fields = Fields("either", 1, prompt="required")
    items = read_batch(write_lines(tmp_path / "b.jsonl", *lines), fields)
    assert [item.path for item in items] == [clip, image]


def test_optional_prompts(clip: Path, tmp_path: Path) -> None:
    fields = Fields("either", 1, prompt="optional")
    batch = write_lines(tmp_path / "b.jsonl", entry(clip), {**entry(clip), "prompt": "x"})
    assert [item.prompt for item in read_batch(batch, fields)] == [None, "x"]
    media = tmp_path / "media"
    media.mkdir()
    shutil.copy(clip, media)
    assert [item.prompt for item in read_batch(media, fields)] == [None]


def test_a_folder_holds_no_prompts(tmp_path: Path) -> None:
    for fields in (PROMPTS, BOTH):
        with pytest.raises(InputError, match="is a folder, which holds no prompts"):
            read_batch(tmp_path, fields)


def test_single_prompt(clip: Path) -> None:
    assert read_single(None, PROMPTS, "a ball") == Item(0, None, "a ball")
    assert read_single(clip, BOTH, "a ball") == Item(0, clip, "a ball")
    with pytest.raises(InputError, match="a Video2World model needs --prompt"):
        read_single(clip, BOTH)
    with pytest.raises(InputError, match="--prompt is empty"):
        read_single(None, PROMPTS, "  ")
    with pytest.raises(InputError, match="--prompt is no valid text"):
        read_single(None, PROMPTS, "a \udcff ball")


def test_items_have_short_names(clip: Path) -> None:
    assert str(Item(0, clip, "a ball")) == str(clip)
    assert str(Item(0, None, "a  red\nball")) == "“a red ball”"
    assert len(str(Item(0, None, "ball " * 99))) < 50
    assert str(Item(0)) == "embeddings"
