"""Frames to files that are either whole or not there.

Clips come whole or piece by piece. A file is encoded in memory, written under a temporary name in
its own folder, and only then takes its name. So an interrupted run leaves no partial video, a full
disk leaves the older file whole, and of two runs that write the same name the later wins entirely.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter
import av.video
import numpy as np
from av.video.reformatter import Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from worldline.errors import Error, InputError
from worldline.files import replacing

Frames = NDArray[np.uint8]

# Quality is above the reference's (crf 25): a finer quantiser costs little on 33 frames, and clips
# get chained and compared. Both encoders give other bytes with other numbers of threads, so the
# number is fixed, whatever the machine has.
_H264 = {"crf": "18", "preset": "medium", "threads": "16"}
_VP9 = {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1", "threads": "8"}

# Container, encoder and its options.
ENCODINGS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": ("mp4", "libx264", _H264),
    ".mov": ("mov", "libx264", _H264),
    ".mkv": ("matroska", "libx264", _H264),
    ".webm": ("webm", "libvpx-vp9", _VP9),
    ".gif": ("gif", "gif", {}),
}

# No random identifiers, no version of the muxer.
_CONTAINER = {"fflags": "+bitexact"}
# The index in front: a browser plays before it has the whole file.
_INDEX_FIRST = {"movflags": "+faststart"}

# of a single frame
PICTURES: dict[str, tuple[str, dict[str, int]]] = {".jpg": ("JPEG", {"quality": 95})}

_LONGEST_NAME = 255  # bytes; of Linux and macOS
_ROOM = 24  # of them, that the temporary name of a file beside a video has more than the video

BT709 = 1  # FFmpeg's number for the matrix, and for the primaries
LIMITED_RANGE = 1


def frames_sha256(frames: Frames) -> str:
    """SHA-256 of frames (T, H, W, 3) as hexadecimal digits: of the pixels, whatever the codec."""
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()


@functools.cache
def _deterministic() -> dict[str, str]:
    """Options of x264 by which equal frames give equal bytes.

    With AVX-512 its macroblock tree reads memory that was never written, at widths that are no
    multiple of 256 pixels and others. Capped at AVX2 it gives the same bytes on every x86
    processor. Only Linux runs on AVX-512 here; a processor without it needs no cap.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        if "avx512" in file.read(8192):  # the first processor
            return {"x264-params": "asm=avx2"}
    return {}


def write_video(frames: Frames, path: str | Path, fps: float) -> None:
    """Write a clip; the suffix chooses the format, and no suffix a folder of numbered PNGs.

    H.264 and VP9 are yuv420p with the BT.709 matrix, tagged as such: what plays everywhere. H.264
    stores even sides only, so an odd side grows by one repeated row or column; the other formats
    keep the exact size. A GIF keeps every frame and one palette; its delays are whole 1/100 s.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        path: `.mp4`, `.mov`, `.mkv`, `.webm` or `.gif` in any case, or no suffix; of one frame
            `.jpg` too. Folders on the way are made.
        fps: frames a second; unused for PNGs.

    Raises:
        InputError: unknown suffix, or a place that cannot be written.
        Error: the disk is full, this build of PyAV lacks the encoder, or the encoder cannot take
            frames of this size or rate.
    """
    path = Path(path)
    _check_frames(frames)
    check_destination(path)
    if not path.suffix:
        with _writing(path) as temporary:
            temporary.mkdir()
            for index, frame in enumerate(frames):
                Image.fromarray(frame).save(temporary / f"{index:05d}.png")
        return
    if path.suffix.lower() in PICTURES:
        kind, options = PICTURES[path.suffix.lower()]
        if len(frames) > 1:
            raise InputError(f"{path}: a picture has 1 frame, not {len(frames)}; use .mp4")
        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, format=kind, **options)
        write_bytes(path, file.getbuffer())
        return
    if path.suffix.lower() == ".gif":
        write_bytes(path, _encode(path, fps, frames.shape[1:3], _in_palette(frames)))
    else:
        write_stream([frames], path, fps)


def write_stream(pieces: Iterable[Frames], path: str | Path, fps: float) -> int:
    """Write a video as `write_video` does, piece by piece, and return how many frames it has.

    Args:
        pieces: uint8 (T, H, W, 3), all of one size; at least one.
        path: `.mp4`, `.mov`, `.mkv` or `.webm`; the file is there once it is whole.
        fps: frames a second, above 0.

    Raises:
        InputError: as `write_video`.
        Error: as `write_video`.
    """
    path = Path(path)
    check_destination(path)
    if path.suffix.lower() in PICTURES:
        raise InputError(f"{path}: a picture has 1 frame; use .mp4")
    if not path.suffix or path.suffix.lower() == ".gif":
        what = "the palette of a GIF needs the whole clip" if path.suffix else "no suffix"
        raise InputError(f"{path}: {what}; use .mp4")
    pieces = iter(pieces)
    first = next(pieces, None)
    if first is None:
        raise ValueError("a video needs at least one frame")
    _check_frames(first)
    height, width = first.shape[1:3]
    # of H.264, which stores even sides only
    odd = ENCODINGS[path.suffix.lower()][1] == "libx264"
    edges = ((0, height % 2 * odd), (0, width % 2 * odd), (0, 0))
    total = 0

    def pictures() -> Iterator[av.VideoFrame]:
        nonlocal total
        for piece in chain([first], pieces):
            _check_frames(piece)
            if piece.shape[1:3] != (height, width):
                raise ValueError(f"frames of {piece.shape[1:3]} after some of {(height, width)}")
            for frame in piece:
                yield _in_yuv(np.pad(frame, edges, mode="edge"))
                total += 1

    size = height + edges[0][1], width + edges[1][1]
    write_bytes(path, _encode(path, fps, size, pictures()))
    return total


def check_destination(path: str | Path) -> None:
    """Refuse, before any work is done, a name that `write_video` would not take.

    Raises:
        InputError: unknown suffix, a name that is too long, a place that cannot be looked at, or a
            folder is in the way.
    """
    path = Path(path)
    _check_lengths(path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # folders are made, and a file in their place is told when they are
    except OSError as error:
        raise _cannot_write(path, error) from error
    if path.suffix and path.suffix.lower() not in (*ENCODINGS, *PICTURES):
        raise InputError(
            f"{path}: cannot write {path.suffix} videos; use {' '.join(ENCODINGS)}, "
            "or a name without suffix for a folder of PNGs"
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise InputError(f"{path} is a folder{'' if path.suffix else ' that is not empty'}")
    if not path.suffix and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a folder of PNGs cannot take its name")


def _check_lengths(path: Path) -> None:
    for name in path.parts:
        most = _LONGEST_NAME - _ROOM * (name == path.name)
        size = len(os.fsencode(name))
        if size > most:
            raise InputError(
                f"{path} cannot be written: a name in it has {size} bytes; it may have {most}"
            )


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all; folders on the way are made.

    Raises:
        InputError: the place cannot be written.
        Error: the disk is full or failed.
    """
    with _writing(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`replacing`, in a folder that is made, with errors of ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise _cannot_write(path, error) from error


def contact_sheet(
    rows: Sequence[Frames],
    path: str | Path,
    labels: Sequence[str] = (),
    *,
    columns: int = 9,
    cell_width: int = 192,
) -> None:
    """Write a PNG with a row of frames for each clip, to look at many clips at once.

    Each row shows frames evenly spread over its clip, the first and the last included, with their
    numbers; narrower frames are not enlarged.

    Args:
        rows: clips, each uint8 (T, H, W, 3); sizes and lengths may differ.
        path: where the PNG goes.
        labels: a text above each row, or none.
        columns: most frames in a row.
        cell_width: most pixels a frame is wide.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    if labels and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    for row in rows:
        _check_frames(row)
    font = ImageFont.load_default()
    gap, line = 4, 14
    strips: list[list[tuple[int, Image.Image]]] = []
    for row in rows:
        picks = np.unique(np.linspace(0, len(row) - 1, min(columns, len(row))).round().astype(int))
        height, width = row.shape[1:3]
        scale = min(1.0, cell_width / width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        strips.append(
            [
                (int(i), Image.fromarray(row[i]).resize(size, Image.Resampling.LANCZOS))
                for i in picks
            ]
        )
    heights = [strip[0][1].height + line * (2 if labels else 1) + gap for strip in strips]
    wide = gap + max(sum(image.width + gap for _, image in strip) for strip in strips)
    sheet = Image.new("RGB", (wide, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for number, strip in enumerate(strips):
        below = top
        if labels:
            # Pillow's own font, the only one sure to be there, draws boxes for the rest.
            text = labels[number].encode("ascii", "replace").decode()
            draw.text((gap, below), text, fill="black", font=font)
            below += line
        left = gap
        for index, image in strip:
            draw.text((left, below), str(index), fill="gray", font=font)
            sheet.paste(image, (left, below + line))
            left += image.width + gap
        top += heights[number]
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    write_bytes(path, file.getbuffer())


def _check_frames(frames: Frames) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; uint8 (T, H, W, 3), not empty, is needed"
        )


def _cannot_write(path: Path, error: OSError) -> Error:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Error(f"{path} was not written: {reason}; files that were there are untouched")
    if error.errno == errno.EIO:
        return Error(f"{path} was not written: {reason}")
    return InputError(f"{path} cannot be written: {reason}")


def _encode(
    path: Path,
    fps: float,
    size: tuple[int, ...],
    pictures: Iterable[av.VideoFrame],
) -> memoryview:
    """Return the bytes of the video.

    Args:
        path: its suffix chooses the format.
        fps: frames a second.
        size: rows and columns of a picture.
        pictures: as the encoder takes them; they get their times here.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    container, encoder, options = ENCODINGS[path.suffix.lower()]
    if encoder not in av.codec.codecs_available:
        raise Error(f"this build of PyAV has no {encoder} encoder; install PyAV's own wheel")
    rate = Fraction(fps).limit_denominator(1001)
    if encoder == "libx264":
        options = options | _deterministic()
    file = io.BytesIO()
    with av.open(
        file,
        "w",
        format=container,
        options=_CONTAINER | (_INDEX_FIRST if container in ("mp4", "mov") else {}),
        io_open=lambda *_: io.BytesIO(file.getvalue()),  # faststart reads again what it moves
    ) as output:
        stream: Any = output.add_stream(encoder, rate=rate, options=options)
        stream.height, stream.width = size
        if encoder == "gif":
            stream.pix_fmt = "pal8"
        else:
            stream.pix_fmt = "yuv420p"
            # Without tags players guess the matrix from the height, and the colours shift.
            stream.codec_context.colorspace = BT709
            stream.codec_context.color_primaries = BT709
            stream.codec_context.color_trc = BT709
            stream.codec_context.color_range = LIMITED_RANGE
        # None at the end: the encoder gives what it still holds back.
        for index, picture in enumerate(chain(pictures, [None])):
            if picture is not None:
                picture.pts = index
                picture.time_base = 1 / rate
            try:
                output.mux(stream.encode(picture))
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                raise Error(
                    f"{path} was not written: {encoder} cannot encode frames of "
                    f"{size[1]} x {size[0]} at {fps:g} a second: {error.strerror or error}"
                ) from error
    return file.getbuffer()


def _in_yuv(frame: Frames) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)


def _in_palette(frames: Frames) -> Iterator[av.VideoFrame]:
    """Bring all frames to one palette of 256 colours, so that what stands still does not flicker.

    Pillow could write the GIF, but merges equal neighbours and so loses frames.
    """
    graph = av.filter.Graph()
    unit = Fraction(1)  # of time; the palette does not depend on it
    height, width = frames.shape[1:3]
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=unit
    )
    split = graph.add("split")
    make = graph.add("palettegen", "reserve_transparent=0")
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(make, 0, 0)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = index
        picture.time_base = unit
        graph.push(picture)
    graph.push(None)
    while True:
        try:
            filtered = graph.pull()
        except (av.error.EOFError, av.error.BlockingIOError):
            return
        assert isinstance(filtered, av.VideoFrame)
        yield filtered
