"""LeRobot data sets as inputs: exact frames of both layouts, commands, training, bad data."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import worldline.cli.fleet
from tests.cli.conftest import run_words
from tests.cli.results import check_mentions
from tests.cli.test_fleet import InProcess
from tests.lerobot_sets import (
    FILES,
    FPS,
    FRONT,
    LENGTHS,
    TASKS,
    WRIST,
    describe,
    expected,
    places,
    rows_of_v3,
    write_frames,
    write_rows,
    write_v2,
    write_v3,
)
from worldline.cli.inputs import MEDIA, PROMPTS, TYPED_MEDIA, TYPED_TEXT_MEDIA, Lines
from worldline.errors import InputError
from worldline.family import Item
from worldline.inputs import read_clip
from worldline.lerobot.choice import parse_choice
from worldline.lerobot.dataset import open_dataset
from worldline.train.data.clips import Clips, Window, open_clips
from worldline.train.data.frames import Transform
from worldline.train.data.texts import Texts
from worldline.video.span import Span, open_timeline

AR, DIFFUSION = "tiny-Cosmos-Predict1-4B", "tiny-Cosmos-Predict1-7B-Video2World"
FLOW = "tiny-Cosmos-Predict2.5-2B"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders v3 and v2 of a data set each."""
    folder = tmp_path_factory.mktemp("sets")
    write_v3(folder / "v3")
    write_v2(folder / "v2")
    return folder


@pytest.fixture
def copy(sets: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Data set of a layout that a test may damage."""
    return lambda layout: Path(shutil.copytree(sets / layout, tmp_path / layout))


def named(folder: Path, camera: str = FRONT, **parameters: object) -> str:
    stated = {"camera": camera, **parameters} if camera else parameters
    return f"lerobot:{folder}#" + "&".join(f"{key}={value}" for key, value in stated.items())


def spans_of(name: str) -> dict[int, Span]:
    spans = {}
    for index, found in open_dataset(name).spans():
        assert not isinstance(found, InputError), found
        assert found[1]
        spans[index] = found[1]
    return spans


def problems_of(name: str) -> dict[int, str]:
    """Why episodes cannot be used."""
    found = dict(open_dataset(name).spans())
    return {index: str(one) for index, one in found.items() if isinstance(one, InputError)}


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


# --- frames


@pytest.mark.parametrize("layout", ["v3", "v2"])
@pytest.mark.parametrize("camera", [FRONT, WRIST])
def test_every_frame_is_that_of_its_episode(sets: Path, layout: str, camera: str) -> None:
    spans = spans_of(named(sets / layout, camera, frames=99))
    assert [*spans] == [0, 1, 2, 3]
    for episode, span in spans.items():
        clip = span.read(99)
        assert places(clip.frames) == expected(camera, episode, range(LENGTHS[episode]))
        assert clip.fps == FPS


def test_groups_of_pictures_within_episodes(copy: Callable[[str], Path]) -> None:
    """An episode begins in the middle of a group, and goes on over several."""
    folder = copy("v3")
    frames = [(WRIST, episode, frame) for episode in (1, 2, 3) for frame in range(LENGTHS[episode])]
    write_frames(folder / f"videos/{WRIST}/chunk-000/file-001.mp4", frames, group=7)
    for episode, span in spans_of(named(folder, WRIST, episodes="1-3", start=2, frames=15)).items():
        assert places(span.read(15).frames) == expected(WRIST, episode, range(2, 17))
        assert places(span.read(3).frames) == expected(WRIST, episode, range(14, 17))


@pytest.mark.parametrize("layout", ["v3", "v2"])
def test_start_stride_and_frames_choose(sets: Path, layout: str) -> None:
    name = named(sets / layout, WRIST, episodes="1-2", start=4, stride=3, frames=7)
    for episode, span in spans_of(name).items():
        taken = [*range(4, LENGTHS[episode], 3)][:7]
        assert places(span.read(99).frames) == expected(WRIST, episode, taken)
        assert places(span.read(2).frames) == expected(WRIST, episode, taken[-2:])
        assert span.frames == 7
        assert span.fps == FPS / 3


def test_without_a_number_the_first_frames_are_read(sets: Path) -> None:
    [span] = spans_of(named(sets / "v3", episodes=3, start=2)).values()
    assert places(span.read(5).frames) == expected(FRONT, 3, range(2, 7))


def test_h264_with_b_frames(tmp_path: Path) -> None:
    """Whose packets are stored in another order, and of which the first is not displayed at 0."""
    write_v3(tmp_path, "libx264")
    for episode, span in spans_of(named(tmp_path, WRIST, frames=9, start=11)).items():
        assert places(span.read(9).frames) == expected(WRIST, episode, range(11, 20))


def test_times_decide_and_not_numbers(tmp_path: Path) -> None:
    """A file with twice the frames a second of its data set."""
    path = tmp_path / "fast.mp4"
    write_frames(path, [(FRONT, 0, number) for number in range(30)], fps=2 * FPS)
    timeline = open_timeline(path)
    assert [*timeline.numbers(0.5, 10, FPS)] == [*range(10, 30, 2)]
    assert [*timeline.numbers(0.52, 10, FPS)] == [*range(10, 30, 2)]  # the nearest
    for begin, count in ((0.5, 12), (2.0, 1), (0.0, 31)):
        with pytest.raises(InputError, match=r"fast\.mp4"):
            timeline.numbers(begin, count, FPS)
    with pytest.raises(InputError):  # of 40 frames a second there are 20
        timeline.numbers(0.0, 20, 4 * FPS)


# --- names


def test_names_of_data_sets(tmp_path: Path) -> None:
    choice = parse_choice("lerobot:a/b#camera=c.d&episodes=0-9,12&start=1&stride=2&frames=9")
    assert (choice.folder, choice.camera) == (Path("a/b"), "c.d")
    assert (choice.start, choice.stride, choice.frames) == (1, 2, 9)
    assert [n for n in range(20) if choice.takes(n)] == [*range(10), 12]
    assert parse_choice("lerobot:a").takes(10**6)
    assert parse_choice("lerobot:a#camera=with%20space").camera == "with space"
    hashed = tmp_path / "a#b"
    hashed.mkdir()
    assert parse_choice(f"lerobot:{hashed}").folder == hashed
    assert parse_choice(f"lerobot:{hashed}#camera=c").camera == "c"


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ("lerobot:", "folder"),
        ("lerobot:#camera=x", "folder"),
        ("lerobot:a#strid=2", "strid stride"),
        ("lerobot:a#colour=red", "colour camera episodes start stride frames"),
        ("lerobot:a#camera", "camera"),
        ("lerobot:a#camera=", "camera"),
        ("lerobot:a#stride=0", "stride 0 1"),
        ("lerobot:a#stride=-2", "stride -2"),
        ("lerobot:a#frames=1.5", "frames 1.5"),
        ("lerobot:a#frames=99999999999999999999", "frames"),
        ("lerobot:a#start=²", "start"),
        ("lerobot:a#episodes=3-1", "episodes 3-1"),
        ("lerobot:a#episodes=a", "episodes a"),
        ("lerobot:a#episodes=1,,2", "episodes"),
        ("lerobot:a#stride=1&stride=2", "stride twice"),
        ("LeRobot:no/folder", "no/folder"),
        ("lerobot:https://huggingface.co/x", "URL"),
        ("lerobot:no/such/folder", "no/such/folder"),
        (f"lerobot:{__file__}", "folder"),
    ],
)
def test_wrong_names(words: str, mentioned: str) -> None:
    with pytest.raises(InputError) as error:
        open_dataset(words)
    assert len(str(error.value).splitlines()) == 1
    check_mentions(str(error.value), mentioned)


# --- descriptions of data sets


def test_the_camera_must_be_named_where_there_are_several(sets: Path) -> None:
    for camera, mentioned in (
        ("", f"{FRONT} {WRIST} camera"),
        ("observation.images.frnt", FRONT),
        ("wrist", f"mean {WRIST}"),
    ):
        with pytest.raises(InputError) as error:
            open_dataset(named(sets / "v3", camera))
        check_mentions(str(error.value), mentioned)


def test_the_only_camera_need_not_be_named(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    change(folder / "meta/info.json", lambda info: info["features"].pop(WRIST))
    assert open_dataset(f"lerobot:{folder}").choice.camera == FRONT
    depth = {"dtype": "video", "info": {"video.is_depth_map": True}}
    change(folder / "meta/info.json", lambda info: info["features"].update(depth=depth))
    assert open_dataset(f"lerobot:{folder}").choice.camera == FRONT


@pytest.mark.parametrize(
    ("edit", "mentioned"),
    [
        ({"codebase_version": "v1.6"}, "info.json codebase_version v1.6 v2.1 v3.0"),
        ({"codebase_version": "v4.0"}, "codebase_version v4.0"),
        ({"codebase_version": None}, "codebase_version v2.1"),
        ({"codebase_version": 3}, "codebase_version 3"),
        ({"fps": 0}, "info.json fps 0"),
        ({"fps": "30"}, "fps 30"),
        ({"fps": True}, "fps True"),
        ({"features": []}, "info.json features"),
        ({"features": {"action": {"dtype": "float32"}}}, "info.json video"),
        ({"features": {FRONT: {"dtype": "image"}}}, f"info.json {FRONT} image"),
        ({"features": {FRONT: {"dtype": "image"}, WRIST: {"dtype": "video"}}}, f"{FRONT} {WRIST}"),
    ],
)
def test_wrong_descriptions(
    copy: Callable[[str], Path], edit: dict[str, Any], mentioned: str
) -> None:
    folder = copy("v2")
    change(folder / "meta/info.json", lambda info: info.update(edit))
    with pytest.raises(InputError) as error:
        open_dataset(named(folder))
    assert len(str(error.value).splitlines()) == 1
    check_mentions(str(error.value), mentioned)


@pytest.mark.parametrize(
    ("pattern", "size", "mentioned"),
    [
        ("videos/{video_key}/{frame_index}.mp4", 2, "video_path"),
        ("../{video_key}/{episode_index:06d}.mp4", 2, "video_path"),
        ("/etc/{episode_index}", 2, "video_path"),
        ("{video_key.__class__}", 2, "video_path"),
        ("{episode_index:0999999999d}", 2, "video_path"),
        (None, 2, "video_path None"),
        ("videos/{episode_index:06d}.mp4", 0, "no such file"),
        ("videos/{episode_chunk}/{episode_index:06d}.mp4", 0, "chunks_size 0"),
    ],
)
def test_wrong_patterns(
    copy: Callable[[str], Path], pattern: str | None, size: int, mentioned: str
) -> None:
    folder = copy("v2")
    edit = {"video_path": pattern, "chunks_size": size}
    change(folder / "meta/info.json", lambda info: info.update(edit))
    problems = problems_of(named(folder))
    assert [*problems] == [0, 1, 2, 3]
    for index, problem in problems.items():
        assert len(problem.splitlines()) == 1
        check_mentions(problem, f"{folder} {index} {mentioned}" if size else f"{folder} {index}")


def test_files_that_are_absent_or_damaged(copy: Callable[[str], Path]) -> None:
    second, third = copy("v2"), copy("v3")
    parquet = third / "meta/episodes/chunk-000/file-001.parquet"
    whole = parquet.read_bytes()
    for content in (b"", whole[:100], b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 999):
        parquet.write_bytes(content)
        with pytest.raises(InputError) as error:
            open_dataset(named(third))
        check_mentions(str(error.value), f"{parquet} parquet")
        assert len(str(error.value).splitlines()) == 1
    shutil.rmtree(third / "meta/episodes")
    lines = second / "meta/episodes.jsonl"
    lines.write_text(lines.read_text() + "{\n")
    for folder, mentioned in ((third, "meta/episodes"), (second, "episodes.jsonl 5")):
        with pytest.raises(InputError) as error:
            open_dataset(named(folder))
        check_mentions(str(error.value), mentioned)
    for path in (lines, second / "meta/info.json"):
        path.unlink()
        with pytest.raises(InputError) as error:
            open_dataset(named(second))
        check_mentions(str(error.value), str(path))


def test_broken_episodes_are_named(copy: Callable[[str], Path]) -> None:
    third = copy("v3")
    rows = rows_of_v3()
    begin, end, file = (
        f"videos/{WRIST}/{n}" for n in ("from_timestamp", "to_timestamp", "file_index")
    )
    rows[0]["length"] = 0
    rows[1][file] = None
    rows[2][begin] = -1.0
    rows[3]["length"] += 9
    write_rows(third, rows)
    problems = problems_of(named(third, WRIST))
    for index, mentioned in enumerate(
        ("length 0", file, begin, f"length {LENGTHS[3] + 9} to_timestamp")
    ):
        check_mentions(problems[index], f"{third} {index} {mentioned}")
    rows[3][end] += 0.9
    write_rows(third, rows)  # longer than its file, by its own account
    check_mentions(problems_of(named(third, WRIST))[3], "file-001.mp4 42")
    assert [*problems_of(named(third))] == [0, 3]  # of the other camera
    path = third / f"videos/{FRONT}/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:2000])
    check_mentions(problems_of(named(third))[1], f"{third} 1 file-000.mp4")
    path.unlink()
    check_mentions(problems_of(named(third))[1], f"{third} 1 file-000.mp4")


def test_episodes_that_are_not_there(sets: Path, copy: Callable[[str], Path]) -> None:
    for episodes in ("4", "0-4", "9-12"):
        with pytest.raises(InputError) as error:
            open_dataset(named(sets / "v3", episodes=episodes))
        check_mentions(str(error.value), f"{episodes} 0 3")
    second = copy("v2")
    lines = (second / "meta/episodes.jsonl").read_text().splitlines()
    (second / "meta/episodes.jsonl").write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(InputError) as error:
        open_dataset(named(second))
    check_mentions(str(error.value), "episodes.jsonl 1 twice")
    check_mentions(problems_of(named(sets / "v3", start=30))[2], "25 start 30")


def test_a_data_set_that_lacks_episodes_is_noted(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("v3")
    (folder / "meta/episodes/chunk-000/file-001.parquet").unlink()
    assert [*open_dataset(named(folder)).rows] == [0, 1]
    check_mentions(caplog.text, "2 4 total_episodes")


def test_pyarrow_is_needed_for_v3_alone(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'pip install "worldline\[lerobot\]"'):
        open_dataset(named(sets / "v3"))
    assert len(open_dataset(named(sets / "v2")).rows) == 4


def test_numbers_of_tasks(copy: Callable[[str], Path]) -> None:
    """v2.0 has words; some converters write the numbers, or several tasks."""
    folder = copy("v2")
    rows = [
        {"episode_index": 0, "length": 30, "tasks": [1]},
        {"episode_index": 1, "length": 36, "tasks": ["Wave.", "Bow\nlow.", "Wave."]},
        {"episode_index": 2, "length": 25, "tasks": []},
        {"episode_index": 3.0, "length": [33]},
    ]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change(folder / "meta/info.json", lambda info: info.update(codebase_version="v2.0"))
    found = open_dataset(named(folder)).rows.values()
    assert [getattr(row, "task", row) for row in found] == [TASKS[1], "Wave.; Bow low.", "", ""]


# --- inputs of commands


def read(reader: Lines, name: str, **stated: Any) -> list[Item]:
    items, problems = reader.read(reader.flags.parse({"batch_input_path": name}), stated)
    assert not problems
    return items


@pytest.mark.parametrize("layout", ["v3", "v2"])
def test_a_line_is_an_episode(sets: Path, layout: str) -> None:
    items = read(MEDIA, named(sets / layout, frames=9))
    assert [item.output for item in items] == [
        Path("outputs", f"episode_{number:06}.mp4") for number in range(4)
    ]
    for number, item in enumerate(items):
        assert item.stated == {"prompt": TASKS[number], "num_input_frames": 9}
        assert isinstance(item.input, Span)
        clip = read_clip(item.input, "video", 9)
        assert places(clip.frames) == expected(FRONT, number, range(9))
        assert f"episode {number}" in item.place


def test_readers_of_other_commands(sets: Path) -> None:
    name = named(sets / "v3", episodes="1,3")
    assert [item.stated for item in read(TYPED_MEDIA, name)] == [{}, {}]
    assert [i.stated for i in read(TYPED_TEXT_MEDIA, name)] == [
        {"prompt": TASKS[n]} for n in (1, 3)
    ]
    [one] = read(PROMPTS, f"lerobot:{sets / 'v3'}#episodes=2")  # text alone needs no camera
    assert (one.input, one.stated) == (None, {"prompt": TASKS[2]})
    stated = read(MEDIA, named(sets / "v3", frames=20), num_input_frames=9)[0].stated
    assert stated["num_input_frames"] == 9


def test_a_prompt_takes_the_place_of_tasks(sets: Path) -> None:
    stated = [item.stated for item in read(TYPED_TEXT_MEDIA, named(sets / "v3"), prompt="Wave.")]
    assert stated == [{"prompt": "Wave."}] * 4


def test_all_that_is_wrong_is_named_at_once(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    rows = rows_of_v3()
    rows[1]["length"], rows[2]["tasks"] = 0, []
    write_rows(folder, rows)
    flags = TYPED_TEXT_MEDIA.flags.parse({"batch_input_path": named(folder)})
    items, problems = TYPED_TEXT_MEDIA.read(flags, {})
    assert [item.output.stem for item in items] == ["episode_000000", "episode_000003"]
    for problem, mentioned in zip(problems, ("1 length", "2 task"), strict=True):
        check_mentions(problem, mentioned)


COMMANDS = {
    "autoregressive base": ("--ar_model_dir", AR, "--disable_diffusion_decoder"),
    "diffusion video2world": ("--diffusion_transformer_dir", DIFFUSION, "--num_steps", 1),
}


@pytest.mark.parametrize(
    "command",
    [pytest.param("autoregressive base", marks=pytest.mark.slow), "diffusion video2world"],
)
def test_a_batch_of_episodes(command: str, sets: Path, tmp_path: Path) -> None:
    name = named(sets / "v3", WRIST, episodes="0,2", frames=9)
    words = (*command.split(), *COMMANDS[command], "--video_save_folder", tmp_path / "out")
    words = (*words, "--batch_input_path", name)
    result = run_words(words)
    assert result.exit_code == 0, result.output
    outputs = [tmp_path / "out" / f"episode_{number:06}" for number in (0, 2)]
    for output, number in zip(outputs, (0, 2), strict=True):
        report = json.loads(output.with_suffix(".json").read_text())
        check_mentions(report["input"], f"{WRIST} {number}")
        assert report["request"]["num_input_frames"] == 9
        assert output.with_suffix(".mp4").exists()
    reports = [output.with_suffix(".json").read_bytes() for output in outputs]
    assert run_words((*words, "--resume")).exit_code == 0
    assert [output.with_suffix(".json").read_bytes() for output in outputs] == reports
    other = [named(sets / "v3", WRIST, episodes="0,2", frames=9, start=1), "--resume"]
    assert run_words((*words[:-1], *other, "--shard", "1/2")).exit_code == 0
    again = [output.with_suffix(".json").read_bytes() for output in outputs]
    assert again[0] == reports[0]
    assert again[1] != reports[1]  # of other frames


def test_samples_of_episodes(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = named(sets / "v2", episodes="1")
    words = ("predict2.5", "--model", FLOW, "-i", name, "-o", tmp_path, "--num_steps", 1)
    assert run_words(words).exit_code == 0
    report = json.loads((tmp_path / "episode_000001.json").read_text())
    assert report["request"]["prompt"] == TASKS[1]
    assert report["request"]["num_input_frames"] == 5
    monkeypatch.setattr(worldline.cli.fleet, "import_driver", lambda: InProcess)
    pickle.loads(pickle.dumps(spans_of(name)[1])).read(5)  # as another process has it
    (tmp_path / "episode_000001.mp4").unlink()
    assert run_words(("fleet", *words, "--resume")).exit_code == 0
    assert (tmp_path / "episode_000001.mp4").exists()
    result = run_words((*words, "--inference_type", "image2world", "--dry_run"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("fragment", "mentioned"),
    [
        ("", f"{FRONT} {WRIST}"),
        (f"#camera={FRONT}&stride=30", "episode 0 num_input_frames"),
        (f"#camera={FRONT}&frames=7", "episode 0 num_input_frames 7"),
        (f"#camera={FRONT}&frame=9", "frame frames"),
    ],
)
def test_refusals_of_a_command(sets: Path, tmp_path: Path, fragment: str, mentioned: str) -> None:
    words = ("autoregressive", "base", *COMMANDS["autoregressive base"], "--batch_input_path")
    result = run_words((*words, f"lerobot:{sets / 'v3'}{fragment}"))
    assert result.exit_code == 2
    check_mentions(result.output, mentioned)


def test_data_sets_in_the_wrong_place(sets: Path, tmp_path: Path) -> None:
    folder, name = sets / "v3", named(sets / "v3")
    command = ("autoregressive", "base", *COMMANDS["autoregressive base"])
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"visual_input": name}))
    for words, mentioned in (
        ((*command, "--batch_input_path", folder), f"lerobot:{folder} camera"),
        (("train", AR, "--videos", folder, "--device", "cpu"), f"lerobot:{folder} camera"),
        ((*command, "--input_image_or_video_path", name), "data set batch"),
        ((*command, "--batch_input_path", lines), "line 1 data set"),
        (("generate", AR, name), "data set batch"),
    ):
        result = run_words(words)
        assert result.exit_code == 2
        check_mentions(result.output, mentioned)


# --- training


def clips_of(name: str, **options: Any) -> Clips:
    return open_clips(Path(name), Window(num_frames=5), Transform(64, 96), **options)


def pixels(item: dict[str, Any]) -> Any:
    return item["video"].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("layout", ["v3", "v2"])
def test_an_episode_is_a_clip(sets: Path, layout: str) -> None:
    clips = clips_of(named(sets / layout, WRIST, stride=2), texts=Texts())
    assert len(clips.videos) == 4
    index = 0
    for episode, length in enumerate(LENGTHS):
        numbers = range(0, length, 2)
        for first in range(len(numbers) - 4):
            item = clips[index]
            if first in (0, len(numbers) - 5):
                assert places(pixels(item)) == expected(WRIST, episode, numbers[first : first + 5])
                assert item["ai_caption"] == TASKS[episode]
                assert item["fps"] == FPS / 2
                assert item["name"] == f"episode_{episode:06}, frames {first} to {first + 4}"
            index += 1
    assert index == len(clips)
    assert len({*clips.contents}) == 4
    assert len({clips._key(*clips.locate(n)) for n in range(len(clips))}) == len(clips)


def test_broken_episodes_are_skipped_and_counted(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("v3")
    rows = rows_of_v3()
    rows[0]["length"] = 0
    write_rows(folder, rows)
    (folder / f"videos/{FRONT}/chunk-000/file-001.mp4").write_bytes(b"\0" * 5000)
    clips = clips_of(named(folder))
    assert str(clips) == "32 samples of 1 video, 3 skipped"
    check_mentions(caplog.text, "episode 0 episode 2 episode 3 file-001.mp4")
    with pytest.raises(InputError) as error:
        clips_of(named(folder, episodes="2-3"))
    check_mentions(str(error.value), "2 file-001.mp4")


def test_texts_of_episodes(copy: Callable[[str], Path]) -> None:
    folder = copy("v2")
    lines = (folder / "meta/episodes.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "tasks": []} for line in lines]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        clips_of(named(folder), texts=Texts())
    check_mentions(str(error.value), "4 episode_000000 --caption")
    assert clips_of(named(folder), texts=Texts(caption="A robot."))[0]["ai_caption"] == "A robot."
    assert "ai_caption" not in clips_of(named(folder))[0]


@pytest.mark.parametrize("model", [AR, FLOW])
def test_post_training(
    model: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("WORLDLINE_CACHE", str(tmp_path / "cache"))
    name = named(sets / "v3", episodes="1-3")
    words = ("train", model, "--videos", name, "--max_steps", 2, "--device", "cpu")
    keys = ("trainer.precision=float32", "data.num_frames=9", "data.video_size=[64,96]")
    keys = ("--", *keys, "trainer.sample_iter=0", "data.num_workers=0")
    result = run_words((*words, "--dry_run", *keys))
    assert result.exit_code == 0, result.output
    assert name in result.output
    result = run_words((*words, *keys))
    assert result.exit_code == 0, result.output
    check_mentions(result.output, "2 steps")


def test_cameras_have_files_of_their_own() -> None:
    """The fixture has what is easily mistaken: numbers of files that differ by camera."""
    assert FILES[FRONT] != FILES[WRIST]
    row = rows_of_v3()[1]
    indices = {row[f"videos/{camera}/file_index"] for camera in FILES}
    assert indices == {0, 1}
    assert row["data/file_index"] not in indices
    assert describe("v2.1", "")["chunks_size"] == 2
