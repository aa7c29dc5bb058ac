"""A failure rate is a count, its interval, and what the detectors are worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from worldline.evaluate.clips import DETECTORS, Rate, summarise
from worldline.evaluate.failures import find_failures

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/failure_detectors.json"


def test_wilson_interval_of_none_in_ten() -> None:
    """At 0 of n the upper end is z^2 / (n + z^2)."""
    z = 1.959964
    low, high = Rate(0, 10).interval
    assert low == 0
    assert high == pytest.approx(z**2 / (10 + z**2))


def test_wilson_ends_solve_their_equation() -> None:
    """The ends are the rates p from which the count lies exactly z standard deviations away."""
    rate = Rate(7, 50)
    for p in rate.interval:
        assert abs(rate.value - p) / (p * (1 - p) / 50) ** 0.5 == pytest.approx(1.959964)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_rates_are_refused(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="count <= total"):
        Rate(count, total)


def test_failed_clips_are_counted_and_named() -> None:
    picture = np.random.RandomState(0).randint(0, 256, (8, 12, 3)).repeat(8, 0).repeat(8, 1)
    sound = picture[None].repeat(12, 0).astype(np.uint8)
    flat = sound.copy()
    flat[10:] = 128
    result = summarise([find_failures(clip) for clip in (sound, flat, sound)])
    assert result.failed == Rate(1, 3)
    assert result.kinds == {"collapse": 1}
    assert [bool(found) for found in result.failures] == [False, True, False]
    report = json.loads(json.dumps(result.as_json()))
    assert report["failed_clips"][0]["clip"] == 1
    assert set(report["detectors"]) == {"false alarms", "detection"}


def test_no_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one clip"):
        summarise([])


def test_detectors_are_as_good_as_measured() -> None:
    measured = json.loads(RESULTS.read_text())
    for name, rate in DETECTORS.items():
        entry = measured[name.replace(" ", "_")]
        assert (entry["count"], entry["total"]) == (rate.count, rate.total)
    assert DETECTORS["false alarms"].value <= 0.02
    assert DETECTORS["detection"].value >= 0.95
