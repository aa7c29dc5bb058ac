"""A written file is whole or not there, and reads back as what was written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from worldline.errors import Error, InputError
from worldline.video.read import probe, read_image, read_video
from worldline.video.sheet import contact_sheet
from worldline.video.write import (
    check_destination,
    write_bytes,
    write_video,
)


def clip(frames: int = 6, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Smooth colours that drift."""
    t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
    channels = (40 + 2 * x + 3 * t, 200 - 2 * y, 90 + y + x // 2)
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif", ".MP4"])
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"clip{suffix}"
    write_video(clip(), path, 25)
    back = read_video(path)
    assert back.frames.shape == clip().shape
    assert back.fps == 25
    assert np.abs(back.frames.astype(int) - clip()).mean() < 5
    assert os.listdir(path.parent) == [path.name]


def written(frames: NDArray[np.uint8], path: Path, times: int) -> set[bytes]:
    """What is written in several runs, on one processor and on all, with memory churned."""
    contents = set()
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    for run in range(times):
        sizes = np.random.randint(10**3, 3 * 10**6, 8)
        rest = [np.random.bytes(size) for size in sizes]
        del rest
        if processors:
            os.sched_setaffinity(0, {min(processors)} if run % 2 else processors)
        try:
            write_video(frames, path, 16)
        finally:
            if processors:
                os.sched_setaffinity(0, processors)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        contents.add(b"".join(file.name.encode() + file.read_bytes() for file in files))
        for file in files:
            file.unlink()
    return contents


def textured(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Squares that move and grow brighter: weighted prediction and the macroblock tree at work."""
    size = height // 8 + 8, (width + 3 * frames) // 8 + 8, 3
    picture = np.random.RandomState(0).randint(0, 160, size).repeat(8, 0).repeat(8, 1)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        moved = picture[2 * t % 8 :, 3 * t :][:height, :width]
        clip[t] = moved * (0.8 + 0.4 * t / frames)
    return clip


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif", "a", "a.jpg"])
@pytest.mark.parametrize("size", [(32, 48), (64, 96)])
def test_equal_frames_give_equal_bytes(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    frames = textured(1 if name == "a.jpg" else 33, *size)
    assert len(written(frames, tmp_path / name, 8)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif", "a", "a.jpg"])
def test_equal_frames_give_equal_bytes_at_full_size(name: str, tmp_path: Path) -> None:
    frames = textured(1 if name == "a.jpg" else 12, 704, 1280)
    assert len(written(frames, tmp_path / name, 8)) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".MKV", ".webm", ".gif"])
@pytest.mark.parametrize("size", [(40, 64), (41, 63)])
def test_frames_one_after_another_are_the_written_whole(
    suffix: str, size: tuple[int, int], tmp_path: Path
) -> None:
    frames = clip(12, *size)
    whole, pieces = (tmp_path / f"{name}{suffix}" for name in ("whole", "pieces"))
    write_video(frames, whole, 25)
    write_video(iter(frames), pieces, 25)
    assert whole.read_bytes() == pieces.read_bytes()


def test_frames_that_end_in_an_error(tmp_path: Path) -> None:
    def pieces() -> Iterator[NDArray[np.uint8]]:
        yield from clip()
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        write_video(pieces(), tmp_path / "a.mp4", 25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_the_index_is_in_front(suffix: str, tmp_path: Path) -> None:
    write_video(clip(), tmp_path / f"a{suffix}", 25)
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_equal_frames_are_all_kept(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"still{suffix}"
    write_video(np.repeat(clip(1), 33, 0), path, 25)
    assert probe(path).frames == 33
    assert len(read_video(path).frames) == 33


def test_videos_name_their_colour_space(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "a.mp4", 25)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_quality(suffix: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(7).integers(0, 256, (3, 33, 46, 3), dtype=np.uint8)
    path, sizes = tmp_path / f"a{suffix}", []
    for crf in (5, 40):
        write_video(frames, path, 25, crf=crf)
        sizes.append(path.stat().st_size)
    assert sizes[0] > 1.3 * sizes[1]
    write_video(frames, path, 25, lossless=True)
    assert np.array_equal(read_video(path).frames, frames)


@pytest.mark.parametrize(
    ("name", "quality", "mentioned"),
    [
        ("a.gif", {"crf": 20}, "gif"),
        ("a", {"lossless": True}, "PNGs"),
        ("a.mp4", {"crf": 52}, "52, .* 51"),
        ("a.webm", {"crf": 64}, "64, .* 63"),
        ("a.mkv", {"crf": 0, "lossless": True}, "crf 0 and lossless"),
    ],
)
def test_qualities_that_a_format_has_not(
    name: str, quality: dict[str, int], mentioned: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=mentioned):
        write_video(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / name, 25, **quality)
    with pytest.raises(InputError, match=r"120, .* 100"):
        write_video(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / "a.gif", 120)


def test_odd_sides(tmp_path: Path) -> None:
    frames = clip(3, 35, 51)
    for suffix, shape in [(".mp4", (36, 52)), (".webm", (35, 51)), (".gif", (35, 51))]:
        path = tmp_path / f"odd{suffix}"
        write_video(frames, path, 25)
        back = read_video(path).frames
        assert back.shape == (3, *shape, 3)
        assert np.abs(back[:, :35, :51].astype(int) - frames).mean() < 6


def test_folder_of_images_is_exact(tmp_path: Path) -> None:
    write_video(clip(3), tmp_path / "frames", 25)
    names = sorted(os.listdir(tmp_path / "frames"))
    assert names == ["00000.png", "00001.png", "00002.png"]
    back = [np.asarray(Image.open(tmp_path / "frames" / name)) for name in names]
    assert np.array_equal(np.stack(back), clip(3))
    with pytest.raises(InputError, match="not empty"):
        write_video(clip(1), tmp_path / "frames", 25)
    assert os.listdir(tmp_path) == ["frames"]


def test_a_picture(tmp_path: Path) -> None:
    """One frame, close to what was given; several are no picture."""
    smooth = np.linspace(0, 255, 16 * 24 * 3).reshape(1, 16, 24, 3).astype(np.uint8)
    write_video(smooth, tmp_path / "a.JPG", 16)
    again = read_image(tmp_path / "a.JPG").frames
    assert np.abs(again.astype(int) - smooth).mean() < 4
    with pytest.raises(InputError, match="a picture has 1 frame; use "):
        write_video(np.concatenate([smooth, smooth]), tmp_path / "b.jpg", 16)
    assert not (tmp_path / "b.jpg").exists()


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write \.avi"):
        write_video(clip(), tmp_path / "a.avi", 25)
    with pytest.raises(ValueError, match="frames are not uint8"):
        write_video(clip()[:0], tmp_path / "a.mp4", 25)
    with pytest.raises(ValueError, match="frames are not uint8"):
        write_video(clip() / 255, tmp_path / "a.mp4", 25)  # type: ignore[arg-type]
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_destination(tmp_path / "folder.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_video(clip(), tmp_path / "file" / "a.mp4", 25)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_names_that_are_too_long_are_refused_first(tmp_path: Path) -> None:
    """A name that is accepted is short enough for a report and temporary files, too."""
    stem = max(
        (n for n in range(1, 300) if _accepted(tmp_path / "new" / ("é" * n + ".mp4"))), default=0
    )
    assert 90 < stem < 125  # two bytes each
    path = tmp_path / "new" / ("é" * stem + ".mp4")
    write_video(clip(), path, 25)
    write_bytes(path.with_suffix(".json"), b"{}")
    for folder in ("x" * 300, f"new/{'x' * 300}", f"absent/{'x' * 300}", "/".join(["x" * 99] * 99)):
        with pytest.raises(InputError, match="cannot be written"):
            check_destination(tmp_path / folder / "a.mp4")
    assert os.listdir(tmp_path) == ["new"]


def _accepted(path: Path) -> bool:
    try:
        check_destination(path)
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    ("failure", "raised", "pattern"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (OSError(errno.ENOSPC, "No space left on device"), Error, "No space.*untouched"),
        (PermissionError(errno.EACCES, "Permission denied"), InputError, "cannot be written"),
    ],
    ids=["ctrl-c", "full-disk", "forbidden"],
)
def test_failure_leaves_the_old_file(
    failure: BaseException,
    raised: type[BaseException],
    pattern: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        assert len(os.listdir(tmp_path)) == 2  # the temporary is there, and complete
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised, match=pattern):
        write_video(clip(), path, 25)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "width"), [("a.mp4", 16_402), ("a.webm", 70_000), ("a.gif", 70_000)]
)
def test_frames_that_the_encoder_cannot_take(name: str, width: int, tmp_path: Path) -> None:
    with pytest.raises(Error, match=rf"{name} was not written: .* {width} x 16 at 25 a second"):
        write_video(clip(1, 16, width), tmp_path / name, 25)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    stream = SimpleNamespace(codec_context=SimpleNamespace(), encode=fail)
    container = SimpleNamespace(add_stream=lambda *_, **__: stream, mux=fail)
    monkeypatch.setattr(av, "open", lambda *_, **__: nullcontext(container))
    with pytest.raises(MemoryError):
        write_video(clip(), tmp_path / "a.mp4", 25)


def test_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save: Callable[..., None] = Image.Image.save

    def fail(self: Image.Image, path: Path) -> None:
        save(self, path)
        if "00002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(Error, match="No space"):
        write_video(clip(), tmp_path / "frames", 25)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["int", "kill"])
def test_killed_writer_leaves_nothing(how: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from worldline.video.write import write_video\n"
        "frames = np.random.RandomState(0).randint(0, 255, (60, 512, 768, 3), np.uint8)\n"
        "print('ready', flush=True)\n"
        "write_video(frames, sys.argv[1], 25)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(0.3)
    writer.send_signal(how)
    writer.stdout.close()
    assert writer.wait(20) != 0
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([number]) * 300_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_bytes(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a.bin"]


def test_contact_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet([clip(20), clip(3, 60)], path, ["one", "zwölf 世"])
    with Image.open(path) as sheet:
        assert sheet.width == 4 + 9 * (64 + 4)  # narrower than 192: not enlarged
        assert np.asarray(sheet).std() > 20
    pictures = {0: clip()[0], 6: clip()[1]}
    contact_sheet([pictures, pictures], path, ["marked", "not"], [{6}])
    with Image.open(path) as sheet:
        red = (np.asarray(sheet) == (255, 0, 0)).all(-1)
        assert red[:80].any()
        assert not red[80:].any()


def test_writing_needs_no_torch() -> None:
    code = (
        "import sys, worldline.video.read, worldline.video.write; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
