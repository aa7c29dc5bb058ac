"""Piece by piece a video is read and written as it is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldline.errors import InputError
from worldline.video.read import read_image, read_video
from worldline.video.stream import scaled, stream_media
from worldline.video.write import write_stream, write_video

from ..conftest import moving


@pytest.mark.parametrize("count", [1, 5, 12, 100])
def test_pieces_are_the_whole(clip: Path, count: int) -> None:
    pieces = list(stream_media(clip, count))
    assert [len(piece) for piece in pieces[:-1]] == [count] * (len(pieces) - 1)
    assert np.array_equal(np.concatenate(pieces), read_video(clip).frames)


def test_an_image_is_one_piece(image: Path) -> None:
    [piece] = stream_media(image, 8)
    assert np.array_equal(piece, read_image(image).frames)


@pytest.mark.parametrize("suffix", [".mp4", ".MKV", ".webm"])
@pytest.mark.parametrize("size", [(40, 64), (41, 63)])
def test_written_pieces_are_the_written_whole(
    tmp_path: Path, suffix: str, size: tuple[int, int]
) -> None:
    frames = moving(12, *size)
    write_video(frames, tmp_path / f"whole{suffix}", 25)
    assert write_stream(np.split(frames, [5, 6]), tmp_path / f"pieces{suffix}", 25) == 12
    whole, pieces = (read_video(tmp_path / f"{name}{suffix}") for name in ("whole", "pieces"))
    assert np.array_equal(whole.frames, pieces.frames)
    assert whole.fps == pieces.fps == 25


def test_what_cannot_be_streamed(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(InputError, match="palette"):
        write_stream([moving(2)], tmp_path / "a.gif", 25)
    with pytest.raises(InputError, match=r"\.avi"):
        write_stream([moving(2)], tmp_path / "a.avi", 25)
    with pytest.raises(InputError, match="no suffix"):
        write_stream([moving(2)], tmp_path / "a", 25)
    with pytest.raises(ValueError, match="at least one frame"):
        write_stream([], tmp_path / "a.mp4", 25)
    with pytest.raises(ValueError, match="fps is 0"):
        write_stream([moving(2)], tmp_path / "a.mp4", 0)
    with pytest.raises(ValueError, match=r"frames of \(16, 24\) after some of"):
        write_stream([moving(2), moving(2, 16, 24)], tmp_path / "a.mp4", 25)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        list(stream_media(tmp_path / "cut.mp4", 4))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cut.mp4"]


def test_a_clip_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    def pieces():  # type: ignore[no-untyped-def]
        yield moving(2)
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        write_stream(pieces(), tmp_path / "a.mp4", 25)
    assert not list(tmp_path.iterdir())


def test_scaling_by_the_short_side() -> None:
    frames = moving(2, 40, 64)
    assert scaled(frames, 20).shape == (2, 20, 32, 3)
    assert scaled(frames.transpose(0, 2, 1, 3), 20).shape == (2, 32, 20, 3)
    assert scaled(frames, 25).shape == (2, 25, 40, 3)
    picture = Image.fromarray(frames[1]).resize((32, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(scaled(frames, 20)[1], np.asarray(picture))
