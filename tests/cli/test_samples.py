"""Files of samples: every form of them, where paths start, and what is wrong in which field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worldline.documents import without_comments
from worldline.errors import InputError
from worldline.families.predict2_5.request import FlowRequest
from worldline.families.predict2_5.samples import SAMPLES, SampleFlags
from worldline.family import Item

from .results import check_mentions

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "predict2_5"
TEXT = {"inference_type": "text2world", "prompt": "a ball rolls"}


def bomb(start: str, innermost: str, end: str) -> str:
    """YAML of five anchors, in each of which the one before stands 40 times."""
    lines, value = [], innermost
    for name in "cdefg":
        lines.append(f"{name}: &{name} {start}{f'{value},' * 40}{end}\n")
        value = f"*{name}"
    return "".join(lines)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read_all(*files: Path, **overrides: Any) -> tuple[list[Item], list[str]]:
    flags = {"input_files": [*map(str, files)], "output_dir": "out", **overrides}
    stated = {name: flags.pop(name) for name in FlowRequest.model_fields if name in flags}
    items, problems = SAMPLES.read(SampleFlags.parse(flags), stated)
    for item in [*items]:
        try:
            FlowRequest.make(item.stated, {}, item.kind, item.field)
        except InputError as error:
            items.remove(item)
            problems += str(error).splitlines()
    return items, problems


def read(path: Path, value: Any, **overrides: Any) -> list[Item]:
    items, problems = read_all(write(path, value), **overrides)
    assert not problems
    return items


def test_only_what_is_stated_is_asked_for(tmp_path: Path) -> None:
    [item] = read(tmp_path / "a.json", {**TEXT, "name": "a", "resolution": "none"})
    assert item.stated == {"prompt": TEXT["prompt"], "num_input_frames": 0}
    assert item.sample == {**TEXT, "name": "a", "resolution": "none"}
    assert item.output == Path("out/a.mp4")
    given = {"seed": 3, "guidance": 2, "num_steps": 4, "negative_prompt": "fog", "chunk_size": 9}
    more = {"resolution": "32, 48", "num_output_frames": 1}
    [item] = read(tmp_path / "a.json", {**TEXT, "name": "a", **given, **more})
    size = {"height": 32, "width": 48, "num_video_frames": 1, "num_input_frames": 0}
    del given["chunk_size"]  # of long videos alone
    assert item.stated == {"prompt": TEXT["prompt"], **given, **size}
    assert item.output == Path("out/a.jpg")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, {"num_video_frames": 77, "chunk_size": 77}),
        (
            {"num_output_frames": 20, "chunk_size": 9, "chunk_overlap": 5},
            {"num_video_frames": 20, "chunk_size": 9, "chunk_overlap": 5},
        ),
    ],
)
def test_long_videos(given: dict[str, int], asked: dict[str, int], tmp_path: Path) -> None:
    long = {**TEXT, "name": "a", "enable_autoregressive": True, **given}
    [item] = read(tmp_path / "a.json", long)
    assert item.stated.items() >= asked.items()


def test_every_form(tmp_path: Path) -> None:
    one, two = ({**TEXT, "name": name} for name in "ab")
    lines = "\n".join(["// both", json.dumps(one), "", json.dumps(two) + " // the second"])
    by_yaml = "".join(f"- {{name: {n}, inference_type: text2world, prompt: x}}\n" for n in "ab")
    # a merge overrides: nothing stands there twice
    merged = (
        "- &one {name: a, inference_type: text2world, prompt: x, seed: 5}\n"
        "- {<<: *one, name: b, seed: 6}\n"
    )
    first_release = {
        "inference_type": "text2world",
        "seed": 3,
        "samples": {"a": {"prompt": "x"}, "b": {"prompt": "y", "seed": 4}},
    }
    for file, value, seeds in (
        ("a.json", [one, two], [None, None]),
        ("b.jsonl", lines, [None, None]),
        ("c.yaml", by_yaml, [None, None]),
        ("d.YML", merged, [5, 6]),
        ("e.json", first_release, [3, 4]),
    ):
        items = read(tmp_path / file, value)
        assert [item.label for item in items] == ["a", "b"]
        assert [item.stated.get("seed") for item in items] == seeds


def test_comments() -> None:
    text = '{"a": "http://x // y", // "b"\n "c": "\\"//" // d\n}'
    assert json.loads(without_comments(text)) == {"a": "http://x // y", "c": '"//'}
    assert without_comments(text).count("\n") == text.count("\n")


def test_a_line_ends_where_json_ends_it(tmp_path: Path) -> None:
    """Some signs that end a line of text may stand in a JSON string."""
    sample = {**TEXT, "name": "a", "prompt": "a\u2028b\x85c\u2029d"}
    text = json.dumps(sample, ensure_ascii=False) + "\r\n" + json.dumps({**TEXT, "name": "b"})
    first, second = read(tmp_path / "a.jsonl", text)
    assert (first.stated["prompt"], second.label) == (sample["prompt"], "b")


def test_paths_start_at_the_file_and_those_of_flags_here(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "words.txt", "\ufeff snow falls \n")
    write(tmp_path / "here" / "words.txt", "rain falls")
    (tmp_path / "in.PNG").write_bytes(image.read_bytes())
    stated = {
        "name": "a",
        "inference_type": "image2world",
        "prompt_path": "../words.txt",
        "input_path": "../in.PNG",
    }
    file = tmp_path / "files" / "a.json"
    monkeypatch.chdir(tmp_path / "here")
    [item] = read(file, stated)
    assert item.input is not None
    assert item.input.samefile(tmp_path / "in.PNG")
    assert (item.kind, item.stated["num_input_frames"]) == ("image", 1)
    # in the first release a path wins over words, later words over a path
    both = {**stated, "prompt": "fog"}
    del both["name"]
    for value, overrides, prompt in (
        (stated, {}, "snow falls"),
        ({**both, "name": "a"}, {}, "fog"),
        ({**both, "name": "a"}, {"prompt_path": "words.txt"}, "rain falls"),
        ({"samples": {"a": both}}, {}, "snow falls"),
        ({"samples": {"a": both}}, {"prompt": "hail"}, "hail"),
        ({"samples": {"a": both}}, {"prompt_path": "words.txt"}, "rain falls"),
    ):
        [item] = read(file, value, **overrides)
        assert item.stated["prompt"] == prompt


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ({"name": None}, "name None"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"name": "a\nb"}, r"name 'a\nb'"),
        ({"name": "é" * 101}, "name 200"),
        ({"name": "\ud800"}, "name"),
        ({"name": 7}, "name 7"),
        ({"inference_type": "world"}, "inference_type 'world' text2world"),
        ({"inference_type": "image2world"}, "input_path image2world"),
        (
            {"inference_type": "video2world", "input_path": "in.png"},
            "input_path in.png video2world",
        ),
        ({"input_path": ""}, "input_path"),
        ({"prompt": None, "prompt_path": "gone.txt"}, "prompt_path gone.txt"),
        ({"prompt": None, "prompt_path": "x" * 300}, "prompt_path"),
        ({"prompt": None, "prompt_path": 3}, "prompt_path 3"),
        ({"prompt": None, "prompt_path": " "}, "prompt_path"),
        ({"prompt": None, "prompt_path": "in.png"}, "prompt_path in.png"),
        ({"fps": 1}, "fps inference_type, name"),
        ({"sead": 1}, "sead seed?"),
        ({"num-step": 1}, "num-step num_steps?"),
        ({"Name": "x"}, "Name name?"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"seed": "7"}, "seed '7'"),
        ({"resolution": "704x1280"}, "resolution '704x1280'"),
        ({"resolution": 720}, "resolution 720"),
        ({"seed": 1.5, "num_steps": "x"}, "seed 1.5 num_steps 'x'"),
    ],
)
def test_what_is_wrong(change: dict[str, Any], mentioned: str, tmp_path: Path, image: Path) -> None:
    (tmp_path / "in.png").write_bytes(image.read_bytes())
    file = write(tmp_path / "a.json", {**TEXT, "name": "a", **change})
    items, problems = read_all(file)
    assert items == []
    assert len(problems) == (2 if len(change) > 1 and "num_steps" in change else 1)
    for line in problems:
        assert line.startswith(f"{file}, sample ")
    check_mentions("\n".join(problems), mentioned)


def test_a_flag_that_is_wrong_is_named(tmp_path: Path, image: Path) -> None:
    """By its own name where no sample can have it, else by the samples that it does not suit."""
    two = [
        {**TEXT, "name": "a", "inference_type": "image2world"},
        {**TEXT, "name": "b", "inference_type": "video2world"},
    ]
    file = write(tmp_path / "a.json", two)
    _, problems = read_all(file, input_path=str(image), prompt_path="gone.txt")
    assert {line.split(": ")[0] for line in problems} == {"--prompt_path", "--input_path"}
    _, problems = read_all(file)
    assert [line.split(": ")[0] for line in problems] == [
        f"{file}, item {number}, sample {name!r}, input_path" for number, name in enumerate("ab", 1)
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fall", "fall"),
        ("fall", "Fall"),
        ("GRÖSSE", "größe"),
        ("caf\u00e9", "CAFE\u0301"),
    ],
)
def test_names_that_some_disks_take_for_one(first: str, second: str, tmp_path: Path) -> None:
    listed = write(tmp_path / "a.json", [{**TEXT, "name": first}])
    keyed = write(tmp_path / "b.json", {**TEXT, "samples": {second: {}, "other": {}}})
    _, [problem] = read_all(listed, keyed)
    check_mentions(problem, f"{keyed} {second!r} name {listed} 1 {first!r}")


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    good = json.dumps({**TEXT, "name": "a"})
    lines = write(tmp_path / "a.jsonl", f'{{"name": \n1\n{good}\n{{"name": "b"}}\n{{]\n')
    items = write(tmp_path / "b.json", [1, {**TEXT, "name": "c"}, {**TEXT, "name": "d", "sead": 1}])
    named = {"inference_type": "text2world", "samples": {"e": 1, "g": {"prompt": "x"}}}
    old = write(tmp_path / "c.json", named)
    broken = write(tmp_path / "e.json", '{"name": ')
    other = write(tmp_path / "f.txt", "")
    gone = tmp_path / "gone.yaml"
    found, problems = read_all(lines, items, old, broken, other, gone)
    assert [item.label for item in found] == ["a", "c", "g"]
    assert list(dict.fromkeys(line.split(": ")[0] for line in problems)) == [
        f"{lines}, line 1",
        f"{lines}, line 2",
        f"{lines}, line 4, sample 'b', inference_type",
        f"{lines}, line 5",
        f"{items}, item 1",
        f"{items}, item 3, sample 'd', sead",
        str(old),
        *map(str, (broken, other, gone)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "mentioned"),
    [
        ("a.json", '{"name": "a", "seed": 1, "seed": 2}', "JSON 'seed' twice"),
        ("a.json", '{"samples": {"seed": {}, "seed": {}}}', "JSON 'seed' twice"),
        ("a.jsonl", '\n{"name": "a", "seed": 1, "seed": 2}', "2 JSONL 'seed' twice"),
        ("a.yaml", "name: a\nseed: 1\nseed: 2\n", "YAML 'seed' twice"),
        ("a.yml", "samples: {seed: {prompt: x}, 'seed': {prompt: y}}\n", "YML 'seed' twice"),
        ("a.json", " \n", "JSON input"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.jsonl", '\n{"name": }', "2 JSONL 10"),
        ("a.yaml", "name: a\n\tseed: 1\n", "YAML 2 1"),
        ("a.yaml", "prompt: A dog: it runs", "YAML 1 14"),
        ("a.yaml", "1: a\n", "Keys strings"),
        ("a.yaml", "name: a\nseed: !!timestamp x\n", "'x' timestamp 2"),
        ("a.yaml", "name: a\nseed: !!int ''\n", "'' int 2"),
        ("a.yaml", "name: a\nseed: !!bool x\n", "'x' bool 2"),
        ("a.yaml", "name: a\nseed: !!map x\n", "mapping 2"),
        ("a.yaml", "- !!python/object:os.system {}\n", "os.system 1"),
        ("a.yaml", f"- 1\n- {'1' * 5000}\n", "int 2"),
        ("a.yaml", f"- 1\n- {'59:' * 99}1\n", "int 2"),
        ("a.yaml", "&a [*a]", "aliases"),
        ("a.yaml", "{" * 5000, "deep"),
        ("a.yaml", bomb("[", "0", "]"), "aliases"),
        ("a.yaml", bomb("{<<: [", "{}", "]}"), "aliases"),
        ("a.json", json.dumps([{"input_video": "a.mp4"}]), "1 input_video input_path"),
    ],
)
def test_where_a_file_is_damaged(name: str, text: str, mentioned: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, text)
    _, problems = read_all(file)
    assert problems[0].startswith(str(file))
    check_mentions("\n".join(problems), mentioned)


def test_files_that_are_not_text_or_hold_no_samples(tmp_path: Path, image: Path) -> None:
    (tmp_path / "a.json").write_bytes(image.read_bytes())
    _, [problem] = read_all(tmp_path / "a.json")
    assert problem.startswith(f"{tmp_path / 'a.json'}: ")
    for value in ([], {"samples": {}}):
        file = write(tmp_path / "b.json", value)
        with pytest.raises(ValueError, match=r"b\.json"):
            read_all(file)


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the released samples are not here")
@pytest.mark.parametrize("folder", ["single", "old"])
def test_released_files(folder: str) -> None:
    items, problems = read_all(*sorted((ASSETS / folder).glob("*.json")))
    assert items
    assert not problems
    for item in items:
        assert item.stated["prompt"]
        assert (item.input is None) == (item.stated["num_input_frames"] == 0)
        assert item.input is None or item.input.is_file()
