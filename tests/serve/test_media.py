"""Media of clients: kinds by first bytes, a look inside."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from worldline.serve import media
from worldline.serve.errors import ApiError
from worldline.serve.media import probe, sniff
from worldline.video.write import write_video


def picture(kind: str, size: tuple[int, int] = (48, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def clip(path: Path, count: int = 5) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)
    write_video(frames, path, 24)
    return path


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_pictures_are_known_by_their_first_bytes(kind: str, suffix: str) -> None:
    assert sniff(picture(kind)[:4096]) == ("image", suffix)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_videos_are_known_by_their_first_bytes(suffix: str, tmp_path: Path) -> None:
    other = tmp_path / "picture.png"
    clip(tmp_path / f"clip{suffix}").rename(other)
    assert sniff(other.read_bytes()[:4096]) == ("video", suffix)


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"", "empty"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "playlist"),
        (b"<!DOCTYPE html>", "web page"),
        (b"<svg xmlns=''></svg>", "web page"),
        (b"hello", "text"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypM4A ", "audio"),
        (b"\x80\x81\x82", "unknown"),
    ],
)
def test_other_files_are_refused(head: bytes, word: str) -> None:
    with pytest.raises(ApiError) as refusal:
        sniff(head)
    assert refusal.value.code == "unreadable_media"
    assert word in refusal.value.message
    assert refusal.value.param == "input_reference"


def test_a_look_inside(tmp_path: Path) -> None:
    info = asyncio.run(probe(clip(tmp_path / "clip.mp4"), "video"))
    assert (info["frames"], info["height"], info["width"], info["fps"]) == (5, 32, 48, 24)
    still = tmp_path / "still"
    still.write_bytes(picture("PNG"))
    info = asyncio.run(probe(still, "image"))
    assert (info["kind"], info["frames"], info["height"], info["width"]) == ("image", 1, 32, 48)


def bomb(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    zeros = zlib.compress(bytes(1 << 20))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def sound(path: Path) -> Path:
    """An MP4 of silence alone."""
    with av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    "case", ["truncated", "bomb", "sound", "noise", "claims", "damaged", "html"]
)
def test_unreadable_media(case: str, tmp_path: Path) -> None:
    path, kind = tmp_path / "secret-place.mp4", "video"
    if case == "truncated":
        data = clip(path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif case == "bomb":
        path.write_bytes(bomb(40_000, 40_000))
        kind = "image"
    elif case == "sound":
        sound(path)
    elif case == "noise":
        path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(4000))
    elif case == "claims":
        path.write_bytes(b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n")
    elif case == "html":
        path.write_bytes(b"<html>" * 100)
    else:
        path.write_bytes(picture("PNG")[:-30])
        kind = "image"
    with pytest.raises(ApiError) as refusal:
        asyncio.run(probe(path, "image" if kind == "image" else "video"))
    assert refusal.value.code == "unreadable_media"
    assert refusal.value.param == "input_reference"
    assert "secret-place" not in refusal.value.message
    assert str(tmp_path) not in refusal.value.message


def test_pictures_of_many_pixels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bomb(9000, 5000))
    with pytest.raises(ApiError, match=r"9000 x 5000.*40 million") as caught:
        asyncio.run(probe(path, "image"))
    width, height = map(int, caught.value.message.rpartition("at most ")[2].split(" x "))
    assert 39_900_000 < width * height <= 40_000_000
    assert width / height == pytest.approx(9000 / 5000, rel=1e-3)


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_CHILD_S", 0.01)
    with pytest.raises(ApiError, match="0 seconds"):
        asyncio.run(probe(clip(tmp_path / "clip.mp4"), "video"))
