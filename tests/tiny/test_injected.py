"""The injector breaks what it reports, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tiny.injected import DEGRADATIONS, inject_appearance, inject_collapse

INJECTORS = (inject_appearance, inject_collapse)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    frames = np.random.RandomState(0).randint(0, 256, (33, 8, 12, 3))
    return frames.repeat(6, 1).repeat(6, 2).astype(np.uint8)


@pytest.mark.parametrize("inject", INJECTORS)
def test_only_frames_from_the_start_on_differ(inject, clip: np.ndarray) -> None:
    before = clip.copy()
    for seed in range(10):
        broken = inject(clip, seed)
        assert 9 <= broken.start <= 33 - broken.length
        assert (broken.frames[: broken.start] == clip[: broken.start]).all()
        assert (broken.frames[broken.start + broken.length - 1] != clip[32]).any()
    assert (clip == before).all()


@pytest.mark.parametrize("inject", INJECTORS)
def test_a_seed_gives_the_same_again(inject, clip: np.ndarray) -> None:
    assert (inject(clip, 7).frames == inject(clip, 7).frames).all()
    assert (inject(clip, 7).frames != inject(clip, 8).frames).any()


def test_an_object_has_the_area_it_claims(clip: np.ndarray) -> None:
    for seed in range(10):
        broken = inject_appearance(clip, seed)
        done = broken.start + broken.length - 1
        changed = (broken.frames[done] != clip[done]).any(-1).mean()
        assert 0.06 <= broken.area <= 0.30
        assert changed == pytest.approx(broken.area, abs=0.035)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degradation_keeps_the_clip_recognisable(name: str, clip: np.ndarray) -> None:
    result = DEGRADATIONS[name](clip, 1)
    assert result.shape == clip.shape
    assert result.dtype == np.uint8
    change = np.abs(result.astype(int) - clip).mean()
    assert 0 < change < 40
