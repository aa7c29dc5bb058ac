"""Progress is what was done of what such jobs took; it never falls."""

from __future__ import annotations

import pytest

from worldline.serve.progress import Estimates, Progress
from worldline.serve.records import Job, new_id


def job(**shape: int) -> Job:
    return Job(new_id(), "w", {"seed": 1, "num_steps": 35}, {"num_frames": 9, **shape})


@pytest.mark.parametrize("kind", ["denoise", "tokens"])
def test_shares_before_anything_was_measured(kind: str) -> None:
    progress = Progress(None, 0.0)
    percents = []
    for step in [("text", 0, 1), (kind, 0, 10), (kind, 5, 10), (kind, 10, 10), ("decode", 1, 2)]:
        progress.step(*step, 1.0)
        percents.append(progress.percent)
    assert percents == [0, 4, 49, 94, 97]
    progress.step("decode", 2, 2, 1.0)
    assert progress.percent == 99


def test_time_belongs_to_the_step_that_it_was_spent_in() -> None:
    progress = Progress(None, 0.0)
    steps = [("text", 0, 1, 1.0), ("denoise", 0, 2, 4.0), ("denoise", 1, 2, 9.0)]
    for step in [*steps, ("denoise", 2, 2, 14.0), ("decode", 5, 9, 16.0), ("decode", 9, 9, 17.0)]:
        progress.step(*step)
    assert progress.seconds == {"text": 4.0, "denoise": 10.0, "decode": 3.0}
    assert progress.step_seconds == 5.0


def test_progress_and_time_by_what_the_last_one_took() -> None:
    estimates, first, second = Estimates(), job(), job()
    assert estimates.stages(first) is None
    assert estimates.seconds(first) is None
    estimates.record(first, 20.0, {"text": 4.0, "denoise": 10.0, "decode": 6.0})
    assert estimates.seconds(second) == 20.0
    assert estimates.seconds(job(height=1)) == 20.0  # of another shape: as usual in its world
    assert estimates.stages(job(height=1)) is None
    progress = Progress(estimates.stages(second), 0.0)
    progress.step("text", 0, 1, 0.0)
    assert progress.remaining(0.0) == 20.0
    progress.step("denoise", 0, 2, 4.0)
    assert progress.percent == 20
    progress.step("denoise", 1, 2, 9.0)
    assert progress.percent == 45
    assert progress.remaining(9.0) == pytest.approx(11.0)
    assert progress.remaining(11.0) == pytest.approx(9.0)
    progress.step("denoise", 2, 2, 23.0)  # this machine is slower today
    assert progress.percent == 70
    assert progress.remaining(23.0) == pytest.approx(6 * 23 / 14)


def test_progress_never_falls() -> None:
    progress = Progress(None, 0.0, percent=60)  # a second attempt
    seen = []
    for kind, done in [("text", 0), ("denoise", 1), ("decode", 1), ("denoise", 2), ("decode", 2)]:
        progress.step(kind, done, 4, 1.0)
        seen.append(progress.percent)
    assert seen == sorted(seen)
    assert seen[0] == 60
    progress.step("odd", 0, 0, 1.0)
    assert progress.percent == seen[-1]


def test_what_is_remembered_is_bounded() -> None:
    estimates = Estimates()
    for height in range(2000):
        estimates.record(job(height=height), 1.0, {"text": 1.0})
    assert estimates.stages(job(height=0)) is None
    assert estimates.stages(job(height=1999)) == {"text": 1.0}


def test_time_left_before_a_job_was_measured() -> None:
    """Steps behind the first, of the main stage, count: that one warms up, as the stages before."""
    progress = Progress(None, 0.0)
    for kind, done, when in (("text", 0, 0.0), ("denoise", 0, 8.0), ("denoise", 1, 20.0)):
        progress.step(kind, done, 10 if kind == "denoise" else 1, when)
        assert progress.remaining(when) is None
    for done in range(2, 11):
        progress.step("denoise", done, 10, 19.0 + done)  # a second each
        left = 10 - done + 10 * 6 / 90  # the rest, and decoding by its usual share
        assert progress.remaining(19.0 + done) == pytest.approx(left)
    progress.step("decode", 1, 2, 30.0)
    assert progress.remaining(30.0) == pytest.approx(10 * 3 / 90)
    assert progress.remaining(99.0) == 0
