"""Files of samples: every form of them, where paths start, and what is wrong in which field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worldline.choices import NEGATIVE_PROMPT
from worldline.cli.samples import Sample, check_media, read_samples, without_comments
from worldline.errors import InputError

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "predict2_5"
TEXT = {"inference_type": "text2world", "prompt": "a ball rolls"}


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(path: Path, value: Any, **overrides: Any) -> list[Sample]:
    return read_samples([write(path, value)], overrides)


def test_defaults(tmp_path: Path) -> None:
    [sample] = read(tmp_path / "a.json", {**TEXT, "name": "a"})
    assert sample.negative_prompt == NEGATIVE_PROMPT
    assert (sample.seed, sample.guidance, sample.num_steps, sample.size) == (1, 7, 35, None)
    assert (sample.num_output_frames, sample.num_input_frames) == (None, 0)


def test_every_form(tmp_path: Path) -> None:
    one, two = ({**TEXT, "name": name} for name in "ab")
    lines = "\n".join(["// both", json.dumps(one), "", json.dumps(two) + " // the second"])
    by_yaml = "".join(f"- {{name: {n}, inference_type: text2world, prompt: x}}\n" for n in "ab")
    named = {
        "inference_type": "text2world",
        "seed": 3,
        "samples": {"a": {"prompt": "x"}, "b": {"prompt": "y"}},
    }
    for file, value in (
        ("a.json", [one, two]),
        ("b.jsonl", lines),
        ("c.yaml", by_yaml),
        ("d.YML", by_yaml),
        ("e.json", named),
    ):
        assert [sample.name for sample in read(tmp_path / file, value)] == ["a", "b"]
    assert [sample.seed for sample in read(tmp_path / "e.json", named)] == [3, 3]


def test_comments() -> None:
    text = '{"a": "http://x // y", // "b"\n "c": "\\"//" // d\n}'
    assert json.loads(without_comments(text)) == {"a": "http://x // y", "c": '"//'}
    assert without_comments(text).count("\n") == text.count("\n")


def test_paths_start_at_the_file(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "words.txt", " snow falls \n")
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
    [sample] = read(file, stated)
    assert sample.prompt == "snow falls"
    assert sample.input_path is not None
    assert sample.input_path.samefile(tmp_path / "in.PNG")
    assert sample.num_input_frames == 1
    # what is given for all wins, and its paths start where the command does
    [sample] = read(file, {**stated, "prompt": "fog"}, prompt_path="words.txt", seed=9)
    assert (sample.prompt, sample.seed) == ("rain falls", 9)
    # in the first release a path wins over words, later words over a path
    assert read(file, {**stated, "prompt": "fog"})[0].prompt == "fog"
    old = {
        "inference_type": "text2world",
        "samples": {"a": {"prompt": "fog", "prompt_path": "../words.txt"}},
    }
    [sample] = read(file, old)
    assert (sample.prompt, list(sample.without_effect)) == ("snow falls", ["prompt"])
    [sample] = read(file, old, prompt="hail")
    assert (sample.prompt, list(sample.without_effect)) == ("hail", ["prompt_path"])
    [sample] = read(file, old, prompt_path="words.txt")
    assert (sample.prompt, sample.without_effect) == ("rain falls", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name: "),
        ({"name": "a/b"}, "name: 'a/b' cannot be the name of a file"),
        ({"inference_type": "world"}, "inference_type: 'world'"),
        ({"prompt": " "}, "prompt: it is empty"),
        ({"prompt": None}, "prompt: there is none, and no prompt_path"),
        ({"prompt": None, "prompt_path": "blank.txt"}, "blank.txt is empty"),
        ({"fps": 1}, "fps: there is no such field; there are: name, "),
        ({"sead": 1}, "sead: there is no such field; did you mean seed?"),
        ({"promt": "x"}, "promt: there is no such field; did you mean prompt?"),
        ({"num-step": 1}, "num-step: there is no such field; did you mean num_steps?"),
        ({"Name": "x"}, "Name: there is no such field; did you mean name?"),
        ({"seed": -1}, "seed: -1: "),
        ({"guidance": "much"}, "guidance: 'much': "),
        ({"num_steps": 0}, "num_steps: 0: "),
        ({"resolution": "704x1280"}, "resolution: '704x1280' is neither"),
        ({"resolution": "700,1280"}, "resolution: 700 is no multiple of 16"),
        ({"prompt": None, "prompt_path": "gone.txt"}, "prompt_path: there is no file"),
        ({"prompt": None, "prompt_path": 3}, "prompt_path: 3: it must be a path"),
        ({"inference_type": "image2world"}, "input_path: image2world needs one"),
        ({"inference_type": "image2world", "input_path": ""}, "input_path: it is empty"),
        ({"prompt": None, "prompt_path": " "}, "prompt_path: it is empty"),
        (
            {"input_path": "https://example.com/a.jpg"},
            "input_path: https://example.com/a.jpg: URLs are not fetched",
        ),
        ({"guidance": float("nan")}, "guidance: nan: input should be a finite number"),
        ({"inference_type": "video2world", "input_path": "in.png"}, "image2world continues an"),
        ({"input_path": "a.json"}, "input_path: "),
        ({"input_path": "x" * 300 + ".png"}, "input_path: there is no file"),
        ({"prompt": None, "prompt_path": "x" * 300}, "prompt_path: there is no file"),
        ({"name": "a\nb"}, r"name: 'a\nb' cannot be the name of a file"),
        ({"name": "é" * 101}, "name: 202 bytes are too long for a name"),
        ({"name": "\ud800"}, "is no valid text"),
        ({"seed": True}, "seed: True is no number"),
        ({"guidance": False}, "guidance: False is no number"),
        ({"resolution": [704, 1280]}, "resolution: [704, 1280] is neither"),
        ({"resolution": 720}, "resolution: 720 is neither"),
        ({"name": 7}, "name: 7: it must be text, in quotes"),
        ({"input_path": "clips.mp4"}, "clips.mp4 is a folder"),
        ({"prompt": None, "prompt_path": "in.png"}, "in.png is no text in UTF-8"),
    ],
)
def test_what_is_wrong(change: dict[str, Any], message: str, tmp_path: Path, image: Path) -> None:
    (tmp_path / "in.png").write_bytes(image.read_bytes())
    (tmp_path / "clips.mp4").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    file = tmp_path / "a.json"
    with pytest.raises(InputError) as told:
        read(file, {**TEXT, "name": "a", **change})
    assert message in str(told.value)
    assert str(told.value).startswith(f"{file}, sample ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"prompt": ""}, "--prompt: it is empty"),
        ({"resolution": "100,100"}, "--resolution: 100 is no multiple of 16 from 16 to 1920"),
        ({"num_steps": 0}, "--num_steps: 0: input should be greater than 0"),
        ({"prompt_path": "gone.txt"}, "--prompt_path: there is no file gone.txt"),
        ({"inference_type": "image2world"}, None),
        (
            {"inference_type": "video2world", "input_path": "in.png"},
            "--input_path: in.png is an image, but video2world continues a video; "
            "image2world continues an image",
        ),
    ],
)
def test_what_is_wrong_with_a_flag_is_told_once(
    override: dict[str, Any],
    message: str | None,
    tmp_path: Path,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.png").write_bytes(image.read_bytes())
    two = [{**TEXT, "name": name} for name in "ab"]
    with pytest.raises(InputError) as told:
        read(tmp_path / "a.json", two, **override)
    said = str(told.value).splitlines()
    if message is None:  # it is the samples that lack something
        assert [line.split(", ")[1] for line in said] == ["item 1", "item 2"]
    else:
        assert said == [message]


def test_a_flag_that_suits_some_samples(tmp_path: Path, image: Path) -> None:
    """Those that it does not suit are named."""
    two = [
        {**TEXT, "name": "a", "inference_type": "image2world"},
        {**TEXT, "name": "b", "inference_type": "video2world"},
    ]
    with pytest.raises(InputError) as told:
        read(tmp_path / "a.json", two, input_path=str(image))
    [line] = str(told.value).splitlines()
    assert line.startswith(f"{tmp_path / 'a.json'}, item 2, sample 'b': input_path: ")


def test_what_is_wrong_above_the_samples_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    stated = {"inference_type": "text2world", "prompt": "x", "sede": 1, "num_steps": 0}
    with pytest.raises(InputError) as told:
        read(file, {**stated, "samples": {"a": {}, "b": {"seed": -1}, "c": {"num_steps": 5}}})
    assert [line.split(": ")[:2] for line in str(told.value).splitlines()] == [
        [str(file), "num_steps"],
        [str(file), "sede"],
        [f"{file}, sample 'b'", "seed"],
    ]


@pytest.mark.parametrize(
    ("first", "second"), [("fall", "Fall"), ("GRÖSSE", "größe"), ("caf\u00e9", "CAFE\u0301")]
)
def test_names_that_some_disks_take_for_one(first: str, second: str, tmp_path: Path) -> None:
    listed = write(tmp_path / "a.json", [{**TEXT, "name": first}])
    keyed = write(tmp_path / "b.json", {**TEXT, "samples": {second: {}, "other": {}}})
    with pytest.raises(InputError) as told:
        read_samples([listed, keyed])
    assert str(told.value) == (
        f"{keyed}, sample {second!r}: name: {listed}, item 1 has {first!r}: many disks ignore case"
    )


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    good = json.dumps({**TEXT, "name": "a"})
    bad = json.dumps({"name": "b", "prompt": "x", "seed": "y"})
    lines = write(tmp_path / "a.jsonl", f"{good}\n{bad}\n{good}\n")
    broken = write(tmp_path / "b.json", '{"name": ')
    other = write(tmp_path / "c.txt", "")
    with pytest.raises(InputError) as told:
        read_samples([lines, broken, other, tmp_path / "gone.yaml"])
    said = str(told.value).splitlines()
    assert [line.split(": ")[0] for line in said[:3]] == [
        f"{lines}, line 2, sample 'b'",
        f"{lines}, line 2, sample 'b'",
        f"{lines}, line 3, sample 'a'",
    ]
    assert f"name: {lines}, line 1 has the same" in said[2]
    assert said[3].startswith(f"{broken} is no valid JSON")
    assert said[4].startswith(f"{other}: .txt is none of")
    assert said[5].startswith(f"{tmp_path / 'gone.yaml'} cannot be read")


def test_all_broken_lines_and_items_are_told(tmp_path: Path) -> None:
    good = json.dumps({**TEXT, "name": "a"})
    lines = write(tmp_path / "a.jsonl", f'{{"name": \n[1]\n{good}\n{{"name": "b"}}\n{{]\n')
    items = write(tmp_path / "b.json", [1, {**TEXT, "name": "a"}, {"name": "c", "sead": 1}])
    named = {"inference_type": "text2world", "samples": {"d": 1, "e": {}, "f": {"prompt": "x"}}}
    old = write(tmp_path / "c.json", named)
    with pytest.raises(InputError) as told:
        read_samples([lines, items, old])
    places = [line.split(": ")[0] for line in str(told.value).splitlines()]
    assert list(dict.fromkeys(places)) == [
        f"{lines}, line 1 is no valid JSONL",
        f"{lines}, line 2",
        f"{lines}, line 4, sample 'b'",
        f"{lines}, line 5 is no valid JSONL",
        f"{items}, item 1",
        f"{items}, item 2, sample 'a'",
        f"{items}, item 3, sample 'c'",
        f"{old}, sample 'd'",
        f"{old}, sample 'e'",
    ]


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """Some signs that end a line of text may stand in a JSON string."""
    sample = {**TEXT, "name": "a", "prompt": "a\u2028b\x85c\u2029d"}
    text = json.dumps(sample, ensure_ascii=False) + "\r\n" + json.dumps({**TEXT, "name": "b"})
    first, second = read(tmp_path / "a.jsonl", text)
    assert (first.prompt, second.name) == (sample["prompt"], "b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"name": "a", "seed": 1, "seed": 2}'),
        ("a.json", '{"samples": {"seed": {"prompt": "x"}, "seed": {"prompt": "y"}}}'),
        ("a.jsonl", '{"name": "a", "seed": 1, "seed": 2}'),
        ("a.yaml", "name: a\nseed: 1\nseed: 2\n"),
        ("a.yml", "samples: {seed: {prompt: x}, 'seed': {prompt: y}}\n"),
    ],
)
def test_nothing_is_stated_twice(name: str, text: str, tmp_path: Path) -> None:
    """Of two values one would be lost, and of two samples of a name one video."""
    with pytest.raises(InputError, match="'seed' is there twice"):
        read(tmp_path / name, text)


def test_yaml_may_merge(tmp_path: Path) -> None:
    """What a merge brings is overridden, not there twice."""
    text = (
        "- &one {name: a, inference_type: text2world, prompt: x, seed: 5}\n"
        "- &two {<<: *one, name: b, seed: 6}\n- {<<: *two, name: c}\n"
    )
    assert [sample.seed for sample in read(tmp_path / "a.yaml", text)] == [5, 6, 6]


def test_what_decides_nothing(tmp_path: Path, image: Path) -> None:
    stated = {**TEXT, "name": "a", "negative_prompt": "fog", "chunk_size": 9}
    (tmp_path / "in.png").write_bytes(image.read_bytes())
    [sample] = read(tmp_path / "a.json", {**stated, "input_path": "in.png", "guidance": 0})
    assert list(sample.without_effect) == ["input_path", "negative_prompt", "chunk_size"]
    [sample] = read(tmp_path / "a.json", {**stated, "enable_autoregressive": True})
    assert sample.without_effect == {}
    (tmp_path / "words.txt").write_text("\ufeffsnow falls\n", encoding="utf-8")
    [sample] = read(tmp_path / "a.json", {**stated, "prompt_path": "words.txt"})
    assert (sample.prompt, "prompt_path" in sample.without_effect) == (TEXT["prompt"], True)
    [sample] = read(tmp_path / "a.json", {**stated, "prompt": None, "prompt_path": "words.txt"})
    assert (sample.prompt, "prompt_path" in sample.without_effect) == ("snow falls", False)


def test_files_without_samples(tmp_path: Path) -> None:
    """Each is told, beside files that have some."""
    good = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    for name, value, message in (
        ("d.jsonl", "\n", "no samples in it"),
        ("e.json", [], "no samples in it"),
        ("f.json", {"inference_type": "text2world", "samples": {}}, "no samples in it"),
        ("g.json", {"samples": ["a"]}, '"samples" holds a list, not names and values'),
        ("j.json", {"samples": {"a": {**TEXT, "name": "b"}}}, "sample 'a': name: its key in"),
        ("k.json", {**TEXT, "name": "b", "samples": {"b": {}}}, 'k.json: name and "samples" stand'),
        ("l.json", [{"samples": {"a": TEXT}}], 'item 1: "samples" within one of several samples'),
        ("m.jsonl", {"samples": {"a": TEXT}}, 'line 1: "samples" within one of several samples'),
        ("n.json", {"samples": {"a": {"samples": {}}}}, "sample 'a': \"samples\" within one"),
        ("h.json", [1], "item 1: 1 where names and values are expected"),
        ("i.yaml", "", "nothing where names and values are expected"),
    ):
        file = write(tmp_path / name, value)
        with pytest.raises(InputError) as told:
            read_samples([good, file])
        assert str(told.value).startswith(str(file))
        assert message in str(told.value)
        assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", " \n", "is no valid JSON: it is empty"),
        ("a.jsonl", '\n{"name": }', "line 2 is no valid JSONL: column 10: Expecting value"),
        ("a.yaml", "name: a\n\tseed: 1\n", "line 2, column 1: found character '\\t'"),
        ("a.yaml", "name: a\n\tseed: 1\n", "(lines are indented by spaces)"),
        ("a.yaml", "prompt: A dog: it runs", "line 1, column 14: mapping values"),
        ("a.yaml", "prompt: A dog: it runs", '(text that holds ": " stands in quotes)'),
        ("a.yaml", "name: a\nname: b\n", "is no valid YAML: line 2, column 1: 'name' is there"),
    ],
)
def test_where_a_file_is_damaged(name: str, text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, text)
    with pytest.raises(InputError) as told:
        read_samples([file])
    assert str(told.value).startswith(str(file))
    assert message in str(told.value)
    assert "unicode string" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path: Path, image: Path) -> None:
    (tmp_path / "a.json").write_bytes(image.read_bytes())
    with pytest.raises(InputError, match=r"a\.json cannot be read: it is no text in UTF-8$"):
        read_samples([tmp_path / "a.json"])
    with pytest.raises(InputError, match=r"b\.json cannot be read: No such file or directory$"):
        read_samples([tmp_path / "b.json"])


def test_each_input_is_looked_at_once(
    tmp_path: Path, clip: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under whatever name; not before all that is stated is right."""
    from worldline.cli import samples

    seen: list[Path] = []
    real = samples.probe

    def probe(path: Path, **kind: Any) -> Any:
        seen.append(path)
        return real(path, **kind)

    monkeypatch.setattr(samples, "probe", probe)
    (tmp_path / "in.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "noise.mp4").write_text("hello")
    (tmp_path / "still.png").write_bytes(image.read_bytes())
    made = [
        {**TEXT, "name": f"s{number}", "inference_type": kind, "input_path": path}
        for number, (kind, path) in enumerate(
            (
                ("video2world", "in.mp4"),
                ("image2world", "./in.mp4"),
                ("video2world", str(tmp_path / "in.mp4")),
                ("image2world", "still.png"),
                ("text2world", "noise.mp4"),
            )
        )
    ]
    with pytest.raises(InputError, match="seed"):
        read(tmp_path / "a.json", [*made, {**TEXT, "name": "last", "seed": -1}])
    assert seen == []
    check_media(read(tmp_path / "a.json", made))
    assert [path.name for path in seen] == ["in.mp4", "still.png"]
    bad = [{**made[0], "name": name, "input_path": "noise.mp4"} for name in "ab"]
    with pytest.raises(InputError) as told:
        check_media(read(tmp_path / "b.json", bad))
    assert [line.split(": ")[:2] for line in str(told.value).splitlines()] == [
        [f"{tmp_path / 'b.json'}, item {number}, sample {name!r}", "input_path"]
        for number, name in enumerate("ab", 1)
    ]
    assert len(seen) == 3


def test_slow_looks_are_not_silent(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from worldline.cli import samples

    stated = {**TEXT, "inference_type": "image2world"}
    made = []
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(image.read_bytes())
        made.append({**stated, "name": name, "input_path": f"{name}.png"})
    found = read(tmp_path / "a.json", made)
    with caplog.at_level("INFO"):
        check_media(found)
        assert caplog.messages == []
        monkeypatch.setattr(samples, "SECONDS_OF_SILENCE", 0)
        check_media(found)
    assert caplog.messages == [f"looked at {count} of 3 input files" for count in range(3)]


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the released samples are not here")
@pytest.mark.parametrize("folder", ["single", "old"])
def test_released_files(folder: str) -> None:
    files = sorted((ASSETS / folder).glob("*.json"))
    samples = [sample for file in files for sample in read_samples([file])]
    assert samples
    for sample in samples:
        assert sample.prompt
        assert (sample.input_path is None) == (sample.inference_type == "text2world")


def test_needs_no_torch() -> None:
    script = "import sys, worldline.cli.samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
