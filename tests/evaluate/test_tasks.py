"""The videos of a folder are found, with what is known of them; all problems are named at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from worldline.errors import InputError
from worldline.evaluate.tasks import find_tasks, shortened
from worldline.video.write import write_video

from ..conftest import moving

GIVEN = 9


def write(path: Path, frames: np.ndarray, given: int | None = None, fps: float = 25) -> Path:
    write_video(frames, path, fps)
    if given is not None:
        path.with_suffix(".json").write_text(json.dumps({"request": {"num_input_frames": given}}))
    return path


def names(folder: Path, reference: Path | None = None) -> list[tuple[str, int, str]]:
    plan = find_tasks(folder, reference)
    return [(task.name, task.num_input_frames, task.reference_name) for task in plan.tasks]


def test_videos_are_found_below_and_know_their_conditioning_frames(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "a.mp4", moving(), GIVEN)
    write(tmp_path / "b.webm", moving())
    write(tmp_path / "more" / "a.gif", moving(), 1)
    write(tmp_path / ".hidden" / "c.mp4", moving())
    write(tmp_path / ".d.mp4", moving())
    (tmp_path / "notes.txt").write_text("no video")
    assert names(tmp_path) == [("a.mp4", 9, ""), ("b.webm", 0, ""), ("more/a.gif", 1, "")]
    assert {task.num_input_frames for task in find_tasks(tmp_path, None, 3).tasks} == {3}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"request": 1}', '{"request": {"num_input_frames": "9"}}', "[" * 9**5]
)
def test_other_files_beside_a_video_are_ignored(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.mp4", moving()).with_suffix(".json").write_text(text)
    assert names(tmp_path) == [("a.mp4", 0, "")]


def test_references_are_matched_by_name(tmp_path: Path) -> None:
    folder, true = tmp_path / "made", tmp_path / "made" / "true"  # below, and not judged itself
    for path in ("a.mp4", "more/b.mp4", "c.mp4", "true/a.mp4", "true/a.gif", "true/more/b.webm"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write(folder / path, moving())
    assert names(folder, true) == [
        *(("a.mp4", 0, "a.mp4"), ("c.mp4", 0, ""), ("more/b.mp4", 0, "more/b.webm"))
    ]
    assert find_tasks(folder, true).notes == ("c.mp4 has no reference: not compared",)


def test_a_folder_below_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    for folder in (made, made / "made", tmp_path):
        folder.mkdir(exist_ok=True)
        write(folder / "a.mp4", moving())
    monkeypatch.chdir(tmp_path)
    # made/a.mp4 is to be judged, and is no reference of made/made/a.mp4
    expected = [("a.mp4", 0, "a.mp4"), ("made/a.mp4", 0, "")]
    assert names(Path("made"), Path()) == names(made, tmp_path) == expected
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(InputError, match="holds no videos outside made "):
        names(Path("made"), Path())
    (made / "a.mp4").unlink()
    with pytest.raises(InputError, match="made holds no videos outside made/made "):
        names(Path("made"), Path("made/made"))


def test_other_lengths_and_rates_are_noted(tmp_path: Path) -> None:
    for folder, count, fps in (("made", 12, 25), ("true", 7, 24)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.mp4", moving(count), fps=fps)
    length, speed = find_tasks(tmp_path / "made", tmp_path / "true").notes
    assert "a.mp4 has 12 frames, its reference 7: the first 7 are compared" in length
    assert "25 frames a second, its reference 24" in speed


def test_all_that_cannot_be_compared_is_named_at_once(tmp_path: Path) -> None:
    made, true = tmp_path / "made", tmp_path / "true"
    made.mkdir()
    true.mkdir()
    for name in "abcd":
        write(made / f"{name}.mp4", moving(), GIVEN)
    write(true / "a.mp4", moving(12, 64, 40))
    write(true / "b.mp4", moving(8))
    (true / "c.mp4").write_bytes(b"nothing")
    write(true / "d.mp4", moving())
    with pytest.raises(InputError) as caught:
        find_tasks(made, true)
    message = str(caught.value)
    assert "3 of 4 videos cannot be used" in message
    assert f"a.mp4 is 64 x 40, its reference {true / 'a.mp4'} 40 x 64" in message
    assert f"{true / 'b.mp4'} has 8 frames and 9 conditioning frames" in message
    assert f"{true / 'c.mp4'} is not an mp4" in message


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    empty, made, true = tmp_path / "empty", tmp_path / "made", tmp_path / "true"
    for folder in (empty, made, true):
        folder.mkdir()
    video = write(made / "a.mp4", moving())
    for name in ("b.mp4", "a.gif", "a.webm"):
        write(true / name, moving())
    cases = (
        (tmp_path / "absent", None, "no such folder"),
        (video, None, "is not a folder"),
        (empty, None, "holds no videos"),
        (made, empty, "holds no videos"),
        (made, made, "its own reference"),
        (made, true, "a.mp4 has several references: a.gif, a.webm"),
    )
    for folder, reference, words in cases:
        with pytest.raises(InputError, match=words):
            find_tasks(folder, reference)
    (true / "a.gif").unlink()
    (true / "a.webm").unlink()
    with pytest.raises(InputError, match=r"b\.mp4\) has no video of the name of one in .*a\.mp4"):
        find_tasks(made, true)


def test_a_video_with_nothing_left_to_judge_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving(9), GIVEN)
    with pytest.raises(InputError, match="has 9 frames and 9 conditioning frames"):
        find_tasks(tmp_path)
    with pytest.raises(InputError, match="must be 0 or more"):
        find_tasks(tmp_path, None, -1)
    write(tmp_path / "a.mp4", moving(1), 0)
    with pytest.raises(InputError, match="too few frames, 1; at least 2"):
        find_tasks(tmp_path)


def test_other_files_are_passed_over_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving(), GIVEN).with_suffix(".txt").write_text("its prompt")
    write(tmp_path / "b.preview.mp4", moving())  # as a killed run leaves it
    for name in ("a.png", "b.json", "c.avi", "more/c.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    plan = find_tasks(tmp_path)
    assert [task.name for task in plan.tasks] == ["a.mp4"]
    assert plan.passed_over == ("a.png", "b.json", "b.preview.mp4", "c.avi", "more/c.txt")
    assert plan.notes == ()


def test_a_folder_without_videos_says_what_it_holds(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.json").touch()
    with pytest.raises(InputError, match=r"holds no videos \(.*\), but 0.json, .* and 2 more"):
        find_tasks(tmp_path)


def test_a_video_without_a_report_among_others_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving(), GIVEN)
    write(tmp_path / "b.mp4", moving())
    assert find_tasks(tmp_path).notes == ("no report, so 0 conditioning frames: b.mp4",)
    assert find_tasks(tmp_path, None, 2).notes == ()
    write(tmp_path / "c.mp4", moving())
    (note,) = find_tasks(tmp_path).notes
    assert note == "no report, so 0 conditioning frames: b.mp4, c.mp4"
    (tmp_path / "a.json").unlink()
    assert find_tasks(tmp_path).notes == ()  # plain videos


def test_a_line_of_names_stays_short() -> None:
    names = [str(number) for number in range(12)]
    assert shortened(names[:5]) == "0, 1, 2, 3, 4"
    assert shortened(names) == "0, 1, 2, 3, 4 and 7 more"
