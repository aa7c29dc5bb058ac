"""What is no media gets one line; what is media gives upright RGB and the right count."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from worldline.errors import InputError
from worldline.video import read
from worldline.video.read import (
    check_written,
    kind_in_folder,
    media_kind,
    probe,
    probe_times,
    read_frames,
    read_image,
    read_video,
    stream_media,
)
from worldline.video.write import ENCODINGS, PICTURE_SUFFIXES, write_video

# Quarters of plain colours: which way is up survives any compression.
RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)


def quarters(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:] = RED, GREEN, BLUE, GREY
    return image


def corners(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    h, w = image.shape[0] // 4, image.shape[1] // 4
    return np.stack([image[h, w], image[h, -w], image[-h, w], image[-h, -w]]).astype(np.int64)


def clip(frames: int) -> NDArray[np.uint8]:
    """Frames whose brightness is their number, times 4."""
    levels = np.arange(frames, dtype=np.uint8) * 4
    return np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).copy()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(clip(12), path, 24)
    return path


def refuse(path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        probe(path)
    with pytest.raises(InputError, match=pattern):
        read_video(path)
    with pytest.raises(InputError, match=pattern):
        list(stream_media(path, 4))


def test_last_frames_are_the_end_of_the_clip(video: Path) -> None:
    every = read_video(video)
    assert every.fps == 24
    assert np.allclose(every.frames.mean((1, 2, 3)), np.arange(12) * 4, atol=2)
    assert np.array_equal(read_video(video, last=5).frames, every.frames[-5:])
    assert len(read_video(video, last=50).frames) == 12


@pytest.mark.parametrize("count", [1, 5, 12, 100])
def test_pieces_are_the_whole(count: int, video: Path, tmp_path: Path) -> None:
    pieces = list(stream_media(video, count))
    assert [len(piece) for piece in pieces[:-1]] == [count] * (len(pieces) - 1)
    assert np.array_equal(np.concatenate(pieces), read_video(video).frames)
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    [piece] = stream_media(tmp_path / "a.png", count)
    assert np.array_equal(piece, quarters()[None])


@pytest.mark.parametrize("frames", [1, 2, 9, 70])
def test_probe_counts_what_read_gives(frames: int, tmp_path: Path) -> None:
    for suffix in (".mp4", ".webm", ".gif"):
        path = tmp_path / f"clip{suffix}"
        write_video(clip(frames) % 200, path, 25)
        info = probe(path)
        assert (info.frames, info.height, info.width) == (frames, 32, 48)
        assert len(read_video(path).frames) == frames


def test_a_suffix_may_be_in_capitals(video: Path, tmp_path: Path) -> None:
    path = video.rename(tmp_path / "CLIP.MP4")
    assert probe(path).frames == 12
    Image.fromarray(quarters()).save(tmp_path / "A.JPG")
    assert probe(tmp_path / "A.JPG").width == 64


def test_contents_count_not_the_suffix(video: Path, tmp_path: Path) -> None:
    write_video(clip(3), tmp_path / "a.mkv", 25)
    assert len(read_video((tmp_path / "a.mkv").rename(tmp_path / "a.mp4")).frames) == 3


def test_varying_frame_rate_gives_each_frame_once(tmp_path: Path) -> None:
    path = tmp_path / "varying.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, moment in zip(clip(6), [0, 10, 400, 410, 2000, 2100], strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert probe(path).frames == 6
    assert np.allclose(read_video(path).frames.mean((1, 2, 3)), np.arange(6) * 4, atol=2)


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # clockwise, as a phone held upright stores
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    ],
    ids=["90", "180", "270", "mirror"],
)
def test_rotation_of_the_track_is_applied(matrix, turned, tmp_path: Path) -> None:
    path = tmp_path / "turned.mp4"
    write_video(np.repeat(quarters()[None], 3, 0), path, 25)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # the 3 x 3 matrix of a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = read_video(path, last=2).frames
    expected = turned(quarters())
    info = probe(path)
    assert frames.shape[1:] == expected.shape == (info.height, info.width, 3)
    assert np.abs(corners(frames[0]) - corners(expected)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_an_image_is_applied(orientation: int, tmp_path: Path) -> None:
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: np.rot90(x, 2),
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(undo(quarters()))).save(path, exif=exif)
    frames = read_image(path).frames
    assert np.array_equal(frames, quarters()[None])
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert (probe(path).height, probe(path).width) == (48, 64)


def test_exotic_images_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(quarters())

    def read(picture: Image.Image, name: str, **options: object) -> NDArray[np.uint8]:
        picture.save(tmp_path / name, **options)
        frames = read_image(tmp_path / name).frames
        assert frames.shape == (1, 48, 64, 3)
        return frames[0]

    assert np.array_equal(read(image.quantize(8), "palette.png"), quarters())
    assert np.array_equal(read(image, "lossless.webp", lossless=True), quarters())
    grey = image.convert("L")
    assert np.array_equal(read(grey, "grey.png"), np.array(grey.convert("RGB")))
    assert read(image.convert("1"), "bits.png").max() == 255
    assert np.abs(corners(read(image.convert("CMYK"), "cmyk.jpg")) - corners(quarters())).max() < 8
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(read(deep, "deep.png"), np.array(grey.convert("RGB")))


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:24], alpha[24:, :32] = 0, 128
    image = Image.fromarray(np.concatenate([quarters(), alpha], axis=2))
    image.save(tmp_path / "rgba.png")
    found = corners(read_image(tmp_path / "rgba.png").frames[0])
    half = [round((v * 128 + 255 * 127) / 255) for v in BLUE]
    assert found.tolist() == [[255] * 3, [255] * 3, half, list(GREY)]
    image.convert("LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").frames[0, 0, 0].tolist() == [255] * 3
    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    animated = read_video(tmp_path / "a.gif").frames
    assert animated.shape == (2, 48, 64, 3)
    assert animated[0, 0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_video(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    write_video(clip(20), path, 25)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuse(path, "truncated")


@pytest.mark.parametrize("suffix", [*ENCODINGS, *PICTURE_SUFFIXES])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_what_was_written_is_there_whole(suffix: str, share: float, tmp_path: Path) -> None:
    """A GIF too, which FFmpeg takes for a shorter clip."""
    path = tmp_path / f"clip{suffix}"
    frames = 1 if suffix in PICTURE_SUFFIXES else 12
    write_video(clip(frames), path, 20)
    check_written(path, frames)
    check_written(path, None)
    with pytest.raises(InputError, match=f"has {frames} of {frames + 1} frames"):
        check_written(path, frames + 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}"):
        check_written(path, None)


def test_damaged_video(video: Path) -> None:
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 400] = bytes(400)
    video.write_bytes(data)
    refuse(video, "damaged|no video frames")


def test_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    refuse(path, "no such file")
    for content, pattern in [
        (b"", "empty"),
        (b"just words\n" * 9, "not an mp4.*text"),
        (b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", "not an mp4.*text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (bytes(range(256)), "not an mp4"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "damaged"),
    ]:
        path.write_bytes(content)
        refuse(path, pattern)
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    refuse(folder, "is a directory")


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate, sound.pts = 8000, 0
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    refuse(path, "no video stream")


def test_a_video_without_frames(tmp_path: Path) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        output.start_encoding()
    path = tmp_path / "none.mkv"
    path.write_bytes(file.getvalue())
    refuse(path, "no video frames|End of file")


def test_what_is_no_media(tmp_path: Path) -> None:
    for name in ("a.txt", "noend"):
        (tmp_path / name).write_text("words")
        with pytest.raises(InputError, match="but a text file, nor of another known format"):
            probe(tmp_path / name)


def test_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(quarters()).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="jpg is damaged"):
        probe(path)
    path.write_text("words")
    with pytest.raises(InputError, match="not an image but a text"):
        read_image(path)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_large_image(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Pillow's limit it is read without a word, above it refused."""
    path = tmp_path / f"a{suffix}"
    Image.fromarray(quarters()).save(path)
    pixels = quarters().shape[0] * quarters().shape[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2)  # from here on Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).frames.shape == (1, *quarters().shape)
        assert probe(path).height == len(quarters())
    most = pixels // 2 - 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    message = f"^{re.escape(str(path))} is .*too large.*{pixels} pixels.* {2 * most} pixels"
    with pytest.raises(InputError, match=message):
        probe(path)


def encode(
    path: Path,
    codec: str,
    container: str,
    frames: NDArray[np.uint8],
    pixels: str = "yuv420p",
    **context: Any,
) -> Path:
    """File of a container, whatever its suffix, with settings of its codec."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=20)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 20)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("mpeg4", "avi"),
        ("libx264", "mpegts"),
        ("mpeg2video", "mpeg"),
        ("flv", "flv"),
        ("wmv2", "asf"),
        ("mpeg4", "3gp"),
        ("libvpx-vp9", "matroska"),
        ("libx264", "h264"),
    ],
)
def test_videos_are_known_by_their_contents(codec: str, container: str, tmp_path: Path) -> None:
    for name in ("a.png", "noend", f"a.{container}"):
        path = encode(tmp_path / name, codec, container, clip(14))
        info = probe(path)
        assert (info.kind, info.frames, info.height, info.width) == ("video", 14, 32, 48)
        assert len(read_video(path, last=3).frames) == 3
        assert kind_in_folder(path) == "video"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "AVIF", "JPEG", "JPEG2000", "PPM", "WEBP", "ICO"])
def test_images_are_known_by_their_contents(kind: str, tmp_path: Path) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    for name in ("a.mp4", "noend", "a.jfif"):
        Image.fromarray(quarters(32, 32)).save(tmp_path / name, format=kind)
        info = probe(tmp_path / name)
        assert (info.kind, info.frames, info.height, info.width) == ("image", 1, 32, 32)
        assert (
            np.abs(corners(read_image(tmp_path / name).frames[0]) - corners(quarters())).max() < 30
        )


def test_what_a_folder_holds_beside_media(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", "{}"),
        ("b.m3u8", "#EXTM3U\n"),
        ("c.svg", "<svg/>"),
        ("d", ""),
    ):
        (tmp_path / name).write_text(content)
        assert kind_in_folder(tmp_path / name) is None
    for name, kind in (("a.ts", "video"), ("a.GIF", "video"), ("a.tif", "image")):
        (tmp_path / name).write_text("damaged")
        assert kind_in_folder(tmp_path / name) == kind


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9), Fraction(64, 45)])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_pixels_become_square(aspect: Fraction, container: str, tmp_path: Path) -> None:
    frames = np.repeat(quarters(64, 96)[None], 4, 0)
    path = encode(tmp_path / "a", "mpeg4", container, frames, sample_aspect_ratio=aspect)
    wide = aspect > 1
    size = (64, round(96 * aspect)) if wide else (round(64 / aspect), 96)
    info = probe(path)
    assert (info.height, info.width) == size
    note = f"{aspect.numerator}:{aspect.denominator} "
    assert note in info.notes[0]
    read_back = read_video(path, last=2)
    assert read_back.frames.shape == (2, *size, 3)
    assert read_back.notes == info.notes
    assert np.abs(corners(read_back.frames[0]) - corners(quarters())).max() < 30
    plain = encode(tmp_path / "b", "mpeg4", container, frames, sample_aspect_ratio=Fraction(1))
    assert probe(plain)[2:] == (64, 96, 20.0, ())


NUMBERED = [
    ("libx264", "mp4", "open-gop=1:keyint=9:bframes=3:b-adapt=0"),
    ("libx264", "matroska", "open-gop=1:keyint=9:bframes=3:b-adapt=0"),
    ("libx264", "mpegts", "keyint=9:bframes=2"),
    ("libx264", "mov", "intra-refresh=1:keyint=9"),
    ("mpeg4", "avi", ""),
    ("libvpx-vp9", "webm", ""),
    ("mpeg2video", "mpeg", ""),
]


@pytest.mark.parametrize(("codec", "container", "settings"), NUMBERED, ids=lambda value: value[:8])
@pytest.mark.parametrize("varying", [False, True])
def test_frames_by_their_numbers(
    codec: str, container: str, settings: str, varying: bool, tmp_path: Path
) -> None:
    if varying and container in ("avi", "mpeg"):
        return  # they cannot hold it
    path, rng, moment = tmp_path / "a", np.random.default_rng(3), 0
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"x264-params": settings, "g": "9"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        if varying:
            stream.codec_context.time_base = Fraction(1, 1000)
        for image in rng.integers(0, 256, (40, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if varying:
                moment += int(rng.integers(10, 90))
                frame.pts, frame.time_base = moment, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    frames, (info, times) = read_video(path).frames, probe_times(path)
    assert info.frames == len(times) == 40
    for first, step in ((0, 1), (7, 2), (8, 1), (9, 3), (20, 1), (35, 1)):
        numbers = range(first, min(40, first + 5 * step), step)
        for known in (times, []):
            assert np.array_equal(
                np.stack([*read_frames(path, numbers, known)]), frames[[*numbers]]
            )
    with pytest.raises(InputError, match="frame 40"):
        list(read_frames(path, [3, 40]))


@pytest.mark.parametrize("removed", [4, 9, 23])
def test_a_clip_that_an_editor_cut_without_coding_it_again(removed: int, tmp_path: Path) -> None:
    """Its edit list hides frames, or whole groups of them, which the file still holds."""
    path, cut = encode(tmp_path / "a", "libx264", "mp4", clip(40), gop_size=9), tmp_path / "b"
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(path)) as source, av.open(str(cut), "w", "mp4", options=options) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= removed * packet.duration
                packet.dts -= removed * packet.duration
                packet.stream = stream
                output.mux(packet)
    frames, (info, times) = read_video(cut).frames, probe_times(cut)
    assert np.array_equal(frames, read_video(path).frames[removed:])
    assert info.frames == len(times) == 40 - removed
    numbers = range(1, len(frames), 3)
    assert np.array_equal(np.stack([*read_frames(cut, numbers, times)]), frames[[*numbers]])


def test_only_needed_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, counts = tmp_path / "a.mp4", {"frames": 0, "to_rgb": 0}
    encode(path, "libx264", "mp4", clip(60), gop_size=10)
    _, times = probe_times(path)
    decode, convert = read._Video.frames, read._Video.to_rgb

    def frames(video: Any) -> Any:
        for frame in decode(video):
            counts["frames"] += 1
            yield frame

    def to_rgb(video: Any, frame: Any) -> Any:
        counts["to_rgb"] += 1
        return convert(video, frame)

    monkeypatch.setattr(read._Video, "frames", frames)
    monkeypatch.setattr(read._Video, "to_rgb", to_rgb)
    list(read_frames(path, range(42, 48, 2), times))
    assert counts["frames"] <= 10 + 5 + 1
    assert counts["to_rgb"] == 3
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match="damaged"):
        list(read_frames(path, range(55, 60), times))


@pytest.mark.parametrize("fps", [12, 15, 16, 24, 30, 48, 60, 100])
def test_a_gif_lasts_as_long_as_its_delays(fps: int, tmp_path: Path) -> None:
    write_video(clip(48), tmp_path / "a.gif", fps)
    assert probe(tmp_path / "a.gif").fps == pytest.approx(fps, rel=0.01)
    assert read_video(tmp_path / "a.gif", last=2).fps == probe(tmp_path / "a.gif").fps


def gif(width: int, height: int, frames: int = 3, delay: int = 5, end: bytes = b";") -> bytes:
    """Frames of which one pixel is drawn."""
    frame = b"!\xf9\4\0" + struct.pack("<H", delay) + b"\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    return head + frames * frame + end


def test_delays_and_ends_of_gifs(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    for delay, fps in ((0, 10), (1, 100), (7, 100 / 7), (200, 0.5)):
        path.write_bytes(gif(16, 16, delay=delay))
        assert probe(path).fps == pytest.approx(fps)
    for end in (b"!\xfe\2hi\0;", b";trailing"):
        path.write_bytes(gif(16, 16, end=end))
        assert probe(path)[1:5] == (3, 16, 16, 20)
        assert len(read_video(path).frames) == 3
    path.write_bytes(gif(16, 16, end=b""))
    refuse(path, "truncated")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.99])
def test_a_cut_animation(name: str, share: float, tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.roll(quarters(), 5 * n, 1)) for n in range(20)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=50)
    assert probe(tmp_path / name).height == 48
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        probe(tmp_path / name)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        list(stream_media(tmp_path / name, 5))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.webm").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.gif"))
        for path in tmp_path.iterdir():
            for function in (media_kind, probe, read_video, read_image):
                with pytest.raises(InputError, match="not a regular file"):
                    function(path)


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_frames_that_are_too_large(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small file; a large one may have more."""
    path = tmp_path / name
    write_video(clip(12), path, 10)
    monkeypatch.setattr(read, "MAX_HELD", 32 * 48 * 5)
    monkeypatch.setattr(read, "_PIXELS_PER_BYTE", 0)
    assert len(read_video(path, last=5).frames) == 5
    assert [len(piece) for piece in stream_media(path, 8)] == [5, 5, 2]
    with pytest.raises(InputError, match="frames of 48 x 32 pixels"):
        read_video(path, last=6)
    monkeypatch.setattr(read, "MAX_FRAME", 32 * 48 - 1)
    for function in (probe, media_kind, read_video):
        with pytest.raises(InputError, match="48 x 32 pixels"):
            function(path)
    monkeypatch.setattr(read, "_PIXELS_PER_BYTE", 32 * 48)
    assert len(read_video(path, last=6).frames) == 6


def test_sizes_are_checked_before_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif(9000, 7000))
    picture = io.BytesIO()
    Image.new("1", (9000, 9000)).save(picture, "PNG")
    (tmp_path / "b.png").write_bytes(picture.getvalue())
    for name, words in (("a.gif", "9000 x 7000"), ("b.png", "9000 x 9000")):
        with pytest.raises(InputError, match=words):
            probe(tmp_path / name)


def test_a_codec_that_is_not_known(video: Path) -> None:
    video.write_bytes(video.read_bytes().replace(b"avc1", b"qqqq"))
    refuse(video, "codec")
    with pytest.raises(InputError, match="codec"):
        check_written(video, 12)


def test_heic_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    refuse(tmp_path / "a.jpg", "HEIC")


def test_notes_of_what_reading_changes(tmp_path: Path) -> None:
    path, ten = tmp_path / "a.mp4", clip(10)
    for curve, name in ((16, "PQ"), (18, "HLG"), (1, "")):
        encode(path, "libx264", "mp4", ten, color_trc=curve)
        assert [name in note for note in probe(path).notes] == ([True] if name else [])
    pictures = [Image.fromarray(quarters()), Image.fromarray(quarters()[::-1].copy())]
    for name in ("a.webp", "a.png", "a.tiff"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
        (note,) = read_image(tmp_path / name).notes
        assert "2" in note
    assert not probe(encode(path, "libx264", "mp4", ten)).notes
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, moment in zip(ten, [0, 300, 600, *range(640, 900, 40)], strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    (note,) = read_video(path).notes
    assert "40" in note
    assert "300" in note
    assert not read_video(path, last=4).notes  # these are as long as each other
