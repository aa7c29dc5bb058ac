"""Frames to files that are either whole or not there.

A file is encoded in memory, written under a temporary name in its own folder, then renamed. So an
interrupted run leaves no partial video, a full disk leaves the older file whole, and of two runs
that write the same name the later wins entirely.
"""

import contextlib
import errno
import functools
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from worldline.errors import Error, InputError, strerror
from worldline.files import LONGEST_NAME, replacing_all
from worldline.video.read import BT709, Frames

# Quality is above the reference's (crf 25): a finer quantiser costs little on 33 frames, and clips
# get chained and compared. Both encoders give other bytes with other numbers of threads, so the
# number is fixed, whatever the machine has.
_H264 = {"crf": "18", "preset": "medium", "threads": "16"}
_VP9 = {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1", "threads": "8"}
# No random identifiers, no version of the muxer; in MP4 and MOV the index goes to the front, so
# that a browser plays before it has the whole file.
_MUXER = {"fflags": "+bitexact"}
_MP4 = {**_MUXER, "movflags": "+faststart"}

# Container and its options, encoder and its options.
ENCODINGS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {
    ".mp4": ("mp4", _MP4, "libx264", _H264),
    ".mov": ("mov", _MP4, "libx264", _H264),
    ".mkv": ("matroska", _MUXER, "libx264", _H264),
    ".webm": ("webm", _MUXER, "libvpx-vp9", _VP9),
    ".gif": ("gif", _MUXER, "gif", {}),
}
PICTURE_SUFFIXES = (".jpg",)  # for a single frame
# encoder -> largest crf; encoder, its pixels and options that give back every bit of RGB
_MAX_CRF = {"libx264": 51, "libvpx-vp9": 63}
_LOSSLESS = {
    "libx264": ("libx264rgb", "rgb24", {"crf": "0"}),
    "libvpx-vp9": ("libvpx-vp9", "gbrp", {"lossless": "1", "crf": "0"}),
}

_LIMITED_RANGE = 1  # FFmpeg's number
_GIF_FPS = 100  # a GIF's delays are whole hundredths of a second


def write_video(
    frames: Iterable[Frames],
    path: str | Path,
    fps: float,
    *,
    crf: int | None = None,
    lossless: bool = False,
) -> None:
    """Write a clip; the suffix chooses the format, and no suffix a folder of numbered PNGs.

    Equal frames give equal bytes. H.264 and VP9 are yuv420p with the BT.709 matrix, tagged as such:
    what plays everywhere. H.264 stores even sides only, so an odd side grows by one repeated row or
    column. A GIF keeps every frame and one palette; its delays are whole 1/100 s.

    Args:
        frames: uint8 (T, H, W, 3), RGB, or one frame after another, at least one.
        path: `.mp4`, `.mov`, `.mkv`, `.webm` or `.gif` in any case, or no suffix; for one frame
            `.jpg` too. Missing parent folders are made.
        fps: frames a second, above 0; unused for PNGs.
        crf: constant rate factor of H.264 or VP9, as of `encoding_of`.
        lossless: keep every bit, in RGB, which fewer players show.

    Raises:
        InputError: unknown suffix, or a place that cannot be written.
        Error: the disk is full, this build of PyAV lacks the encoder, or the encoder cannot take
            frames of this size or rate.
    """
    path = Path(path)
    encoding = encoding_of(path, crf, lossless)
    check_destination(path, fps)
    with writing(path) as temporary:
        write_frames(frames, path, fps, temporary, encoding)


def write_frames(
    frames: Iterable[Frames], path: Path, fps: float, file: Path, encoding: dict[str, Any]
) -> None:
    """Write a clip to `file` in the format of `path`, which messages name, see `write_video`."""
    frames = iter(frames)
    head = [*islice(frames, 2)]
    if not head or head[0].dtype != np.uint8 or head[0].shape[2:] != (3,):
        raise ValueError("frames are not uint8 (T, H, W, 3), at least one")
    frames = chain(head, frames)
    if not path.suffix:
        file.mkdir()
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(file / f"{index:05d}.png")
    elif path.suffix.lower() in PICTURE_SUFFIXES:
        if len(head) > 1:
            raise InputError(f"{path}: a picture has 1 frame; use .mp4")
        Image.fromarray(head[0]).save(file, format="JPEG", quality=95)
    else:
        rate = Fraction(fps).limit_denominator(1001)
        file.write_bytes(_encode(path, rate, frames, encoding))


def encoding_of(path: Path, crf: int | None = None, lossless: bool = False) -> dict[str, Any]:
    """Encoder of a video for its report, and how: {"encoder", "crf"} or {"encoder", "lossless"}.

    Raises:
        InputError: `crf` and `lossless` exclude each other, or the format has neither.
    """
    _, _, encoder, options = ENCODINGS.get(
        path.suffix.lower(), ("", {}, "jpeg" if path.suffix else "png", {})
    )
    most = _MAX_CRF.get(encoder)
    if (lossless or crf is not None) and most is None:
        kind = path.suffix or "a folder of PNGs"
        formats = " ".join(suffix for suffix, each in ENCODINGS.items() if each[2] in _MAX_CRF)
        raise InputError(
            f"{path}: crf and lossless are for {formats}, not for {kind}; leave it out"
        )
    if lossless and crf is not None:
        raise InputError(f"{path}: crf {crf} and lossless exclude each other; leave one out")
    if crf is not None and crf not in range((most or 0) + 1):
        raise InputError(f"{path}: crf is {crf}, {encoder} takes 0 (best) to {most}; give such one")
    if lossless:
        return {"encoder": _LOSSLESS[encoder][0], "lossless": True}
    if most is None:
        return {"encoder": encoder}
    return {"encoder": encoder, "crf": int(options["crf"]) if crf is None else crf}


def check_destination(path: str | Path, fps: float = 1, *, resume: bool = False) -> None:
    """Refuse, before any work is done, a name or a rate that `write_video` would not take.

    With `resume` a folder that is not empty may be a finished one.

    Raises:
        InputError: unknown suffix, a name that is too long, a place that is taken, or more frames
            a second than a GIF can have.
    """
    path = Path(path)
    if path.suffix.lower() == ".gif" and fps > _GIF_FPS:
        raise InputError(f"fps is {fps:g}, a GIF has at most {_GIF_FPS}")
    if path.suffix and path.suffix.lower() not in (*ENCODINGS, *PICTURE_SUFFIXES):
        raise InputError(
            f"{path}: cannot write {path.suffix} videos; use {' '.join(ENCODINGS)}, "
            "or a name without suffix for a folder of PNGs"
        )
    # `replacing` gives a name that is longer
    size = max(len(os.fsencode(name)) for name in (*path.parts, path.name + 24 * "x"))
    if size > LONGEST_NAME:
        raise InputError(f"{path} cannot be written: a name has {size} bytes; give a shorter one")
    try:
        folder = path.is_dir()
        if folder and (path.suffix or (not resume and any(path.iterdir()))):
            raise InputError(f"{path} is a folder{'' if path.suffix else ' that is not empty'}")
    except OSError as error:
        raise _cannot_write(path, error) from error
    if not path.suffix and not folder and os.path.lexists(path):
        raise InputError(f"{path} is a file; a folder of PNGs cannot take its name")


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, else raise as `write_video`; parent folders are made."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Temporary name that becomes `path`, as of `replacing`, in a folder that is made."""
    with writing_all([Path(path)]) as [temporary]:
        yield temporary


@contextlib.contextmanager
def writing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names that become `paths` of one folder; messages name the last."""
    *_, path = paths
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_all(paths) as temporaries:
            yield temporaries
    except OSError as error:
        raise _cannot_write(Path(error.filename2 or path), error) from error


def _cannot_write(path: Path, error: OSError) -> Error:
    reason = strerror(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return Error(f"{path} was not written: {reason}; files that were there are untouched")
    return InputError(f"{path} cannot be written: {reason}")


def _encode(
    path: Path, rate: Fraction, frames: Iterable[Frames], chosen: dict[str, Any]
) -> memoryview:
    """Bytes of a file in the format of `path`."""
    container, muxing, encoder, encoding = ENCODINGS[path.suffix.lower()]
    pixels = "rgb24" if encoder == "gif" else "yuv420p"
    if "crf" in chosen:
        encoding = {**encoding, "crf": str(chosen["crf"])}
    elif "lossless" in chosen:
        encoder, pixels, exact = _LOSSLESS[encoder]
        encoding = {**encoding, **exact}
    if encoder not in av.codec.codecs_available:
        raise Error(f"this build of PyAV has no {encoder} encoder; install PyAV's own wheel")
    if "libx264" in encoder:
        encoding = {**encoding, **_deterministic()}
    pictures = _pictures(frames, rate, pixels, even=encoder == "libx264")
    if encoder == "gif":
        pictures = _in_palette(pictures)
    first = next(pictures)
    file = io.BytesIO()

    def reopened(*_: object) -> io.BytesIO:  # faststart reads again what it moves
        return io.BytesIO(file.getvalue())

    with av.open(file, "w", format=container, options=muxing, io_open=reopened) as output:
        stream: Any = output.add_stream(encoder, rate=rate, options=encoding)
        stream.height, stream.width = first.height, first.width
        stream.pix_fmt = first.format.name
        if pixels == "yuv420p":
            # Without tags players guess the matrix from the height, and the colours shift.
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = _LIMITED_RANGE
        # None at the end: the encoder gives what it holds back.
        for picture in chain([first], pictures, [None]):
            try:
                output.mux(stream.encode(picture))
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                raise Error(
                    f"{path} was not written: {encoder} cannot encode frames of {first.width} x "
                    f"{first.height} at {float(rate):g} a second: {strerror(error)}"
                ) from error
    return file.getbuffer()


@functools.cache
def _deterministic() -> dict[str, str]:
    """Options of x264 by which equal frames give equal bytes.

    With AVX-512 its macroblock tree reads memory that was never written, so it is capped at AVX2;
    `docs/LOG.md` has the trials. Only Linux runs on processors with AVX-512 here.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        if "avx512" in file.read(8192):  # flags of the first processor
            return {"x264-params": "asm=avx2"}
    return {}


def _pictures(
    frames: Iterable[Frames], rate: Fraction, pixels: str, *, even: bool
) -> Iterator[av.VideoFrame]:
    """Frames in the format that an encoder takes, with their times; of even sides if need be."""
    for index, frame in enumerate(frames):
        if even:
            frame = np.pad(frame, [(0, side % 2) for side in frame.shape[:2]] + [(0, 0)], "edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if pixels == "yuv420p":
            picture = picture.reformat(format=pixels, dst_colorspace=Colorspace.ITU709)
        elif pixels != "rgb24":
            picture = picture.reformat(format=pixels)
        picture.pts, picture.time_base = index, 1 / rate
        yield picture


def _in_palette(pictures: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Pictures in one palette of 256 colours, so that what stands still does not flicker.

    Pillow could write the GIF, but merges equal neighbours and so loses frames.
    """
    first = next(pictures)
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, time_base=first.time_base
    )
    split, sink = graph.add("split"), graph.add("buffersink")
    make = graph.add("palettegen", "reserve_transparent=0")
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=4")
    graph.link_nodes(source, split, use, sink)
    split.link_to(make, 1, 0)
    make.link_to(use, 0, 1)
    graph.configure()
    for picture in chain([first], pictures, [None]):
        graph.push(picture)
    with contextlib.suppress(av.error.EOFError, av.error.BlockingIOError):
        while True:
            yield graph.vpull()
