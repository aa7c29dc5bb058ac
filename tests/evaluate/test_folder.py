"""The videos of a folder are found, and score as the whole clips, though read frame by frame."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tiny.clips import make_clips
from tiny.injected import inject_appearance, inject_collapse
from worldline.errors import InputError
from worldline.evaluate.failures import find_failures
from worldline.evaluate.folder import Score, Task, as_json, find_tasks, medians, score_video
from worldline.evaluate.metrics import flicker, motion, psnr, ssim
from worldline.video.read import read_video
from worldline.video.write import write_video

from ..conftest import moving

GIVEN = 9


def write(path: Path, frames: np.ndarray, given: int | None = None) -> Path:
    write_video(frames, path, 25)
    if given is not None:
        path.with_suffix(".json").write_text(json.dumps({"request": {"num_input_frames": given}}))
    return path


@pytest.fixture(scope="module")
def physics() -> np.ndarray:
    return make_clips(range(1_700_000, 1_700_003), 20, 64, 96).frames.numpy()


@pytest.mark.parametrize("inject", [None, inject_collapse, inject_appearance])
def test_failures_are_those_of_the_whole_clip(
    physics: np.ndarray, inject: object, tmp_path: Path
) -> None:
    frames = inject(physics[0], 3, GIVEN).frames if callable(inject) else physics[0]
    path = write(tmp_path / "a.mp4", frames)
    score, pictures = score_video(Task("a.mp4", path, GIVEN))
    expected = find_failures(read_video(path).frames, GIVEN)
    assert list(score.failures) == expected
    assert bool(expected) == callable(inject)
    assert {failure.frame for failure in expected} <= pictures.keys()


@pytest.mark.parametrize("given", [0, 1, GIVEN])
def test_measures_are_those_of_the_frames_that_were_not_given(
    physics: np.ndarray, given: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", physics[0])
    other = write(tmp_path / "b.mp4", physics[1, :15])
    score, _ = score_video(Task("a.mp4", path, given, other))
    made, true = read_video(path).frames, read_video(other).frames
    begin = max(0, given - 1)
    assert (score.frames, score.height, score.width) == (20, 64, 96)
    assert score.motion == pytest.approx(motion(made[begin:]))
    assert score.flicker == pytest.approx(flicker(made[begin:]))
    assert (score.reference, score.compared_frames) == (str(other), 15 - given)
    assert score.psnr == pytest.approx(psnr(made[given:15], true[given:]))
    assert score.ssim == pytest.approx(ssim(made[given:15], true[given:]))
    assert score.reference_motion == pytest.approx(motion(true[begin:]))
    assert score.reference_flicker == pytest.approx(flicker(true[begin:]))


def test_given_frames_are_not_judged(physics: np.ndarray, tmp_path: Path) -> None:
    frames = physics[0].copy()
    frames[5:] = physics[1, 5:]
    frames[3:, 16:48, 32:64] = (250, 20, 20)
    path = write(tmp_path / "a.mp4", frames)
    assert score_video(Task("a.mp4", path, 1))[0].failures
    assert not score_video(Task("a.mp4", path, 17))[0].failures


def test_a_blank_video_has_collapsed_unless_it_was_given(tmp_path: Path) -> None:
    blank = np.full((12, 64, 96, 3), 90, np.uint8)
    path = write(tmp_path / "a.mp4", blank)
    (failure,) = score_video(Task("a.mp4", path, 0))[0].failures
    assert failure.kind == "collapse"
    assert not score_video(Task("a.mp4", path, 1))[0].failures


def test_a_still_video_is_sound(physics: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", physics[0, :1].repeat(20, 0))
    score = score_video(Task("a.mp4", path, 0))[0]
    assert score.verdict == "sound"
    assert score.motion < 0.1  # of the codec


def make_score(name: str, psnr_value: float | None, *, failed: bool = False) -> Score:
    compared = {} if psnr_value is None else {"psnr": psnr_value, "reference_motion": 2.0}
    return Score(
        name=name,
        frames=12,
        height=48,
        width=64,
        num_input_frames=2,
        failures=tuple(find_failures(_collapsed(), 2)) if failed else (),
        motion=4.0,
        flicker=3.0,
        **compared,
    )


def _collapsed() -> np.ndarray:
    frames = np.random.RandomState(0).randint(0, 256, (1, 6, 8, 3)).repeat(8, 1).repeat(8, 2)
    frames = frames.repeat(12, 0).astype(np.uint8)
    frames[6:] = 120
    return frames


def test_a_summary_counts_failures_and_takes_medians() -> None:
    scores = [make_score("a", 20.0), make_score("b", 30.0, failed=True), make_score("c", None)]
    assert as_json(scores, {})["failure_rate"]["count"] == 1
    middle = medians(scores)
    assert (middle["motion"], middle["psnr"], middle["reference_motion"]) == (4.0, 25.0, 2.0)
    assert "psnr" not in medians(scores[2:])


def test_a_report_is_json_even_of_equal_videos() -> None:
    report = as_json([make_score("a", math.inf), make_score("b", None)], {"c": "damaged"})
    loaded = json.loads(json.dumps(report, allow_nan=False))
    assert loaded["videos"][0]["psnr"] is None
    assert loaded["medians"]["psnr"] is None
    assert [video["reference_motion"] for video in loaded["videos"]] == [2.0, None]
    assert loaded["unreadable"] == {"c": "damaged"}
    assert loaded["failure_rate"]["total"] == 2


def names(folder: Path, reference: Path | None = None) -> list[tuple[str, int, str]]:
    found = []
    for task in find_tasks(folder, reference):
        name = ""
        if task.reference is not None and reference is not None:
            name = task.reference.relative_to(reference).as_posix()
        found.append((task.name, task.num_input_frames, name))
    return found


def test_videos_are_found_below_and_know_what_was_given(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "a.mp4", moving(), GIVEN)
    write(tmp_path / "b.webm", moving())
    write(tmp_path / "more" / "a.gif", moving(), 1)
    write(tmp_path / ".hidden" / "c.mp4", moving())
    write(tmp_path / ".d.mp4", moving())
    (tmp_path / "notes.txt").write_text("no video")
    assert names(tmp_path) == [("a.mp4", 9, ""), ("b.webm", 0, ""), ("more/a.gif", 1, "")]
    assert {task.num_input_frames for task in find_tasks(tmp_path, None, 3)} == {3}


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
    with pytest.raises(InputError, match="holds no videos"):
        names(Path("made"), Path())
    (made / "a.mp4").unlink()
    with pytest.raises(InputError, match="made holds no videos"):
        names(Path("made"), Path("made/made"))


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    made, small = write(tmp_path / "made.mp4", moving()), np.zeros((12, 8, 8, 3), np.uint8)
    others = {
        "size": (moving(12, 64, 40), r"40, 64.*64, 40"),
        "length": (moving(8), "length.mp4 has no frame behind 9"),
    }
    for name, (frames, words) in others.items():
        path = write(tmp_path / f"{name}.mp4", frames)
        with pytest.raises(InputError, match=words):
            score_video(Task("made.mp4", made, GIVEN, path))
    tiny = write(tmp_path / "tiny.mp4", small)
    with pytest.raises(InputError, match="11 x 11"):
        score_video(Task("tiny.mp4", tiny, GIVEN, tiny))
    (tmp_path / "none.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not an mp4"):
        score_video(Task("made.mp4", made, GIVEN, tmp_path / "none.mp4"))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    empty, made, true = tmp_path / "empty", tmp_path / "made", tmp_path / "true"
    for folder in (empty, made, true):
        folder.mkdir()
    video = write(made / "a.mp4", moving())
    for name in ("b.mp4", "a.gif", "a.webm"):
        write(true / name, moving())
    cases = (
        (tmp_path / "absent", None, "absent holds no videos"),
        (video, None, "a.mp4 holds no videos"),
        (empty, None, "holds no videos"),
        (made, empty, "holds no videos"),
        (made, made, "made holds no videos .* outside"),
        (made, true, "a.mp4 has several references: a.gif, a.webm"),
    )
    for folder, reference, words in cases:
        with pytest.raises(InputError, match=words):
            find_tasks(folder, reference)
    (true / "a.gif").unlink()
    (true / "a.webm").unlink()
    with pytest.raises(InputError, match=r"true has no video of the name of one in .*made"):
        find_tasks(made, true)


def test_a_video_with_nothing_to_judge_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(9))
    with pytest.raises(InputError, match="has 9 frames, 9 of them input; 10 are needed"):
        score_video(Task("a.mp4", path, GIVEN))
    with pytest.raises(InputError, match="has 9 frames, 12 of them input; 13 are needed"):
        score_video(Task("a.mp4", path, 12))


def test_a_video_of_one_frame_is_judged_without_motion(tmp_path: Path) -> None:
    for name, frames, verdict in (("a", moving(1), "sound"), ("b", flat(1, 170), "collapse")):
        score, _ = score_video(Task(name, write(tmp_path / f"{name}.mp4", frames), 0))
        assert (score.frames, score.verdict, score.motion, score.flicker) == (
            1,
            verdict,
            None,
            None,
        )


def flat(frames: int, level: int, noise: int = 0) -> np.ndarray:
    """Frames of one colour, with noise."""
    shape = frames, *moving(1).shape[1:]
    levels = np.random.default_rng(level).integers(-noise, noise + 1, shape)
    return (levels + np.array([level, level // 2, 255 - level])).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("level", [0, 31, 128, 254])
@pytest.mark.parametrize("noise", [0, 8])
def test_a_flat_video_has_collapsed_whatever_its_colour(
    level: int, noise: int, tmp_path: Path
) -> None:
    """From its first frame on or behind its input, and in another colour in each frame."""
    colours = np.concatenate([flat(1, (level + 40 * n) % 256, noise) for n in range(10)])
    for frames, inputs in (
        (flat(10, level, noise), 0),
        (colours, 0),
        (np.concatenate([moving(2), flat(9, level, noise)]), 2),
        (np.concatenate([moving(1), colours]), 0),
    ):
        path = write(tmp_path / "a.mp4", frames)
        (failure,) = score_video(Task("a.mp4", path, inputs))[0].failures
        assert failure.kind == "collapse"
        assert failure.frame >= max(1, inputs)
