"""Windows cover a clip, and what agrees where they overlap is joined unchanged."""

import pytest
import torch

from worldline.sampling.windows import blend_windows, reflected, split_windows


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 14, 16, 20])
@pytest.mark.parametrize(("size", "overlap"), [(8, 2), (6, 1), (4, 0)])
def test_windows_cover_the_clip(length: int, size: int, overlap: int) -> None:
    frames = torch.arange(length).view(1, -1, 1, 1)
    windows = split_windows(frames, size, overlap)
    assert all(window.shape == (1, size, 1, 1) for window in windows)
    assert set(torch.cat(windows, 1).flatten().tolist()) == set(range(length))
    for number, window in enumerate(windows):
        start = number * (size - overlap)
        true = frames[:, start : start + size]
        assert torch.equal(window[:, : true.shape[1]], true)


def test_a_short_window_is_filled_by_reflection() -> None:
    [window] = split_windows(torch.arange(5).view(1, -1), 8, 2)
    assert window.tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]]
    assert [reflected(index, 1) for index in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
def test_windows_of_one_clip_give_it_back(overlap: int) -> None:
    clip = torch.randn(1, 3, 14, 2, 2)
    windows = [clip[:, :, at : at + 5] for at in range(0, 14 - overlap, 5 - overlap)]
    joined = blend_windows(windows, overlap)
    assert torch.allclose(joined, clip[:, :, : joined.shape[2]], atol=1e-6)
    assert joined.shape[2] == 14


def test_impossible_windows() -> None:
    with pytest.raises(ValueError, match="cannot overlap by 4"):
        split_windows(torch.zeros(1, 9), 4, 4)
    with pytest.raises(ValueError, match="cannot overlap by 3"):
        blend_windows([torch.zeros(1, 3, 2, 2, 2)] * 2, 3)
