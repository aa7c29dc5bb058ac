"""Media of clients: kind by first bytes, a look inside by a child process.

Needs no torch. As a program, `python -m worldline.serve.media FILE KIND`, it is that child: it
opens a file with little memory and prints its measurements as JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from worldline.errors import InputError, printable
from worldline.serve.errors import ApiError
from worldline.serve.records import INPUT, MediaKind

HEAD = 4096  # bytes that decide the kind of a file
MAX_PIXELS = 40_000_000  # of a frame
_CHILD_S = 20.0
_CHILD_BYTES = 1_000_000_000  # of address space, beyond the child's own

_FORMATS = "give a png, jpeg or webp image, or an mp4, mov, mkv, webm or gif video"
_BRANDS = {  # of ISO files that are no videos we take
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "a HEIC picture"),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF picture"),
    **dict.fromkeys((b"M4A ", b"M4B "), "audio"),
}
_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # that begin a MOV without ftyp
_OTHERS = (  # first bytes -> kind, for messages
    (b"#EXTM3U", "a playlist"),
    (b"%PDF", "a PDF file"),
    (b"PK\3\4", "a zip file"),
    (b"ID3", "audio"),
    (b"OggS", "an Ogg file"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"\x1f\x8b", "a gzip file"),
)


def sniff(head: bytes) -> tuple[MediaKind, str]:
    """Kind and suffix of a file by its first 4096 bytes, or by all of a shorter one.

    Raises:
        ApiError: unreadable_media.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image", ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", ".jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image", ".webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "video", ".gif"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video", ".webm" if b"\x42\x82\x84webm" in head[:HEAD] else ".mkv"
    kind = ""
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12], "")
        if not kind:
            return "video", ".mov" if head[8:12] == b"qt  " else ".mp4"
    elif head[4:8] in _BOXES:
        return "video", ".mov"
    if not head:
        raise unreadable("the file is empty")
    kind = kind or next((kind for start, kind in _OTHERS if head.startswith(start)), "")
    if not kind:
        page = head.lstrip()[:64].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg"))
        text = head.isascii() and b"\0" not in head
        kind = "a web page" if page else "text" if text else "of an unknown kind"
    raise unreadable(f"the file is {kind}")


def unreadable(problem: str) -> ApiError:
    """The error of an input that is no picture or video."""
    advice = "" if "; " in problem else f"; {_FORMATS}"
    return ApiError("unreadable_media", f"{INPUT}: {problem}{advice}", INPUT)


async def probe(path: str | Path, kind: MediaKind) -> dict[str, Any]:
    """Measurements of a media file by a child process: kind, frames, height, width, fps, notes.

    All packets are read, the first frame is decoded, with little memory and time.

    Args:
        path: the file.
        kind: that its first bytes have.

    Raises:
        ApiError: unreadable_media.
    """
    # one arena and one thread: else each reserves address space
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    words = (sys.executable, "-P", "-m", "worldline.serve.media", str(path), kind)
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    output = b""
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _CHILD_S)
    except TimeoutError:
        raise unreadable(f"it cannot be read within {_CHILD_S:.0f} seconds") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:  # it was killed, or failed in a way of its own
        raise unreadable("it cannot be decoded with 1 GB of memory") from None
    if "error" in answer:
        raise unreadable(str(answer["error"]))
    return answer


def measure(path: Path, kind: MediaKind) -> dict[str, Any]:
    """Measurements of a file, or {"error"}; in the child."""
    from PIL import Image

    from worldline.video.read import probe as read_measurements

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours
    try:
        if kind == "image":
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                width, height = picture.size
            if problem := _too_large(width, height):
                return {"error": problem}
        info = read_measurements(path)
    except InputError as error:
        problem = printable(str(error).replace(f"{path}: ", "").replace(str(path), "it"))
        if kind == "video" and "truncated" in problem:  # its first bytes are those of a video
            reason = problem.rpartition(": ")[2]
            problem = f"the video is damaged or cut short ({reason}); send the whole file"
        return {"error": problem}
    except MemoryError:
        return {"error": "it cannot be decoded with 1 GB of memory"}
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        return {"error": f"it is damaged ({type(error).__name__})"}
    if info.kind != kind:
        return {"error": f"it begins like a file of type {kind} and is none"}
    if problem := _too_large(info.width, info.height):
        return {"error": problem}
    return info._asdict()


def _too_large(width: int, height: int) -> str:
    if width * height <= MAX_PIXELS:
        return ""
    scale = math.sqrt(MAX_PIXELS / (width * height))
    most = f"{max(1, int(width * scale))} x {max(1, int(height * scale))}"
    pixels = f"{width} x {height} pixels are more than {MAX_PIXELS / 1e6:.0f} million"
    return f"{pixels}; scale it down to at most {most}"


def _confine() -> None:
    """Take as little of the machine as a child that opens unknown files may have."""
    with suppress(AttributeError, OSError):  # macOS has none; one thread decodes
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import av  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401

    import worldline.video.read  # noqa: F401

    for limit, value in (
        (resource.RLIMIT_CPU, int(_CHILD_S)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    with suppress(OSError, ValueError):  # macOS has no such file
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _CHILD_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _confine()
    print(json.dumps(measure(Path(sys.argv[1]), "image" if sys.argv[2] == "image" else "video")))
