"""Pictures, videos and folders of them that no command may take, and those that only one may."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .cases import AR, CV, DIT, FLOW, Case, clip_bytes, generate, make_worlds, moving


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a row of it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def flat_png(side: int) -> bytes:
    """A whole PNG of one colour: a few kB however large."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "png")
    return buffer.getvalue()


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """A GIF that claims a size, its frames of one pixel."""
    frame = b"\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    colours = b"\0\0\0\xff\xff\xff"
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + colours
        + frame * frames
        + b";"
    )


def animated(kind: str, frames: int = 30) -> bytes:
    buffer = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in moving(frames))
    first.save(buffer, kind, save_all=True, append_images=others, duration=40)
    return buffer.getvalue()


def still(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def sound() -> bytes:
    """A WAV in an MP4, without a picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", "mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("a.mp4", lambda: b""),
    "zeros": ("a.mp4", lambda: bytes(5000)),
    "noise": ("a.mp4", lambda: bytes((n * 89 + 7) % 253 for n in range(5000))),
    "text": ("a.mp4", lambda: b"frames come later\n" * 50),
    "web page": ("a.mp4", lambda: b"<!DOCTYPE html><html>Sign in</html>"),
    "LFS pointer": ("a.mp4", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    "MP4 cut in half": ("a.mp4", lambda: half(clip_bytes())),
    "MP4 without its index": ("a.mp4", lambda: clip_bytes().replace(b"moov", b"mooz")),
    "unknown codec": ("a.mp4", lambda: clip_bytes().replace(b"avc1", b"zzz1")),
    "damaged codec settings": ("a.mp4", lambda: clip_bytes().replace(b"avcC", b"avcX")),
    "sound alone": ("a.mp4", sound),
    "PNG cut": ("a.png", lambda: half(still("png"))),
    "JPEG cut": ("a.jpg", lambda: half(still("jpeg"))),
    "WebP cut": ("a.webp", lambda: half(still("webp"))),
    "BMP cut": ("a.bmp", lambda: half(still("bmp"))),
    "GIF cut": ("a.gif", lambda: half(animated("gif"))),
    "animated PNG cut": ("a.png", lambda: half(animated("png"))),
    "animated WebP cut": ("a.webp", lambda: half(animated("webp"))),
    "PNG of 60,000 x 60,000": ("a.png", lambda: png(60_000, 60_000)),
    "PNG of 2^31": ("a.png", lambda: png((1 << 31) - 1, 1)),
    "PNG of no width": ("a.png", lambda: png(0, 8)),
    "whole PNG of 30,000 x 30,000": ("a.png", lambda: flat_png(30_000)),
    "GIF of 16,000 x 16,000": ("a.gif", lambda: gif(16_000, 16_000)),
    "60 frames of 8,000 x 8,000": ("a.gif", lambda: gif(8_000, 8_000, 60)),
    "SVG": ("a.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    "PDF": ("a.png", lambda: b"%PDF-1.7\n" + bytes(99)),
    "archive": ("a.mp4", lambda: b"PK\3\4" + bytes(200)),
    "playlist of other files": ("a.mp4", lambda: b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n"),
    "list of other files": ("a.mp4", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n"),
}  # fmt: skip

SPECIALS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere.mp4"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "absent": lambda path: None,
}

ADDRESSES = (
    "https://example.com/a.mp4",
    "http://localhost/a.png",
    "s3://bucket/a.mp4",
    "rtsp://camera/stream",
    "file:///tmp/a.mp4",
    "data:image/png;base64,aaaa",
)


def _continue(model: str, name: str, write: Callable[[Path], object]) -> list[str]:
    make_worlds()
    write(Path(name))
    return generate(model, name)


def _tokenize(name: str, write: Callable[[Path], object]) -> list[str]:
    root = make_worlds()
    write(Path(name))
    return ["tokenize", "encode", name, "--tokenizer_dir", str(root / CV), "--device", "cpu"]


def _evaluate(name: str, write: Callable[[Path], object]) -> list[str]:
    Path("made").mkdir()
    write(Path("made") / name)
    return ["evaluate", "made"]


def _batch(name: str, write: Callable[[Path], object]) -> list[str]:
    make_worlds()
    Path("inputs").mkdir()
    write(Path("inputs") / name)
    words = ["autoregressive", "base", "--checkpoint_dir", "checkpoints", "--ar_model_dir", AR]
    more = ["--disable_guardrail", "--disable_diffusion_decoder", "--video_save_folder", "out"]
    return [*words, "--batch_input_path", "inputs", *more]


def media_cases() -> Iterator[Case]:
    """Each file as the input of a model, and by one of the commands that read many."""
    models = cycle((FLOW, DIT, AR))
    others = cycle((("tokenize", _tokenize), ("evaluate", _evaluate), ("batch", _batch)))
    writers: dict[str, tuple[str, Callable[[Path], object]]] = {}
    for kind, (name, data) in FILES.items():
        writers[kind] = name, (lambda path, data=data: path.write_bytes(data()))
    for kind, make in SPECIALS.items():
        writers[kind] = "a.mp4", make
    for kind, (name, write) in writers.items():
        model = next(models)
        yield Case(f"media, {kind}, {model}", partial(_continue, model, name, write), (name,))
        command, words = next(others)
        yield Case(f"media, {kind}, {command}", partial(words, name, write))
    for address in ADDRESSES:
        model = next(models)
        words = partial(_continue, model, address, lambda path: None)
        yield Case(f"media, {address}, {model}", words, (address.partition(":")[0],))
