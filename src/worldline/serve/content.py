"""Files of videos as answers: ranges, contact sheets, single frames."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import anyio  # of Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from worldline.serve.errors import ApiError
from worldline.serve.records import Job

TYPES = {
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".json": "application/json",
}
SPRITES, COLUMNS, SPRITE_WIDTH = 16, 4, 320
_CHUNK = 256 << 10
_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII)


def file_response(
    request: Request, path: Path, filename: str, headers: dict[str, str] | None = None
) -> Response:
    """A file, or the range of it that is asked for.

    Raises:
        ApiError: video_not_found where the file is gone, range_not_satisfiable.
    """
    try:
        status = path.stat()
    except OSError:
        raise ApiError("video_not_found", "its file is gone", "video_id") from None
    etag = f'"{sha256(f"{status.st_mtime_ns}-{status.st_size}".encode()).hexdigest()[:32]}"'
    size = status.st_size
    media_type = TYPES.get(path.suffix.lower(), "application/octet-stream")
    answer = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, no-cache",
        "content-disposition": f'attachment; filename="{filename}"',
        **(headers or {}),
    }
    known = request.headers.get("if-none-match", "")
    if known == "*" or etag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers={"etag": etag})
    start, end, code = 0, size, 200
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if request.headers.get("if-range", etag) != etag:
        match = None
    if match and any(match.groups()):
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if first and last and int(last) < int(first):
            start, end = 0, size  # no range at all, which is ignored
        elif start >= size:
            message = f"the range begins behind the end of {size:,} bytes"
            raise ApiError("range_not_satisfiable", message, "Range")
        else:
            code = 206
            answer["content-range"] = f"bytes {start}-{end - 1}/{size}"
    answer["content-length"] = str(end - start)
    body = read_range(path, start, end) if request.method != "HEAD" else nothing()
    return StreamingResponse(body, code, answer, media_type)


async def read_range(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    """Bytes of a file."""
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(start)
        while start < end:
            data = await file.read(min(_CHUNK, end - start))
            if not data:
                return
            start += len(data)
            yield data


async def nothing() -> AsyncIterator[bytes]:
    """No bytes."""
    return
    yield b""


def spritesheet(folder: Path) -> Path:
    """JPEG of 16 frames, four in a row, made on the first request."""
    from PIL import Image

    from worldline.files import replacing
    from worldline.video.read import probe, read_frames

    path, video = folder / "spritesheet.jpg", folder / "video.mp4"
    if path.exists():
        return path
    info = probe(video)
    scale = min(1.0, SPRITE_WIDTH / info.width)
    size = round(info.width * scale), max(1, round(info.height * scale))
    sheet = Image.new("RGB", (size[0] * COLUMNS, size[1] * (SPRITES // COLUMNS)))
    numbers = [round((info.frames - 1) * place / (SPRITES - 1)) for place in range(SPRITES)]
    chosen = sorted({*numbers})
    for number, frame in zip(chosen, read_frames(video, chosen), strict=True):  # one at a time
        sprite = Image.fromarray(frame).resize(size)
        for place in (place for place in range(SPRITES) if numbers[place] == number):
            sheet.paste(sprite, (place % COLUMNS * size[0], place // COLUMNS * size[1]))
    with replacing(path) as temporary:
        sheet.save(temporary, "JPEG", quality=85)
    return path


def first_frame(path: Path) -> bytes:
    """First frame of a video as PNG."""
    from PIL import Image

    from worldline.video.read import read_frames

    data = io.BytesIO()
    Image.fromarray(next(read_frames(path, [0]))).save(data, "PNG")
    return data.getvalue()


def refuse_unless_completed(job: Job) -> None:
    """Refuse the results of a job that has none.

    Raises:
        ApiError: not_ready, video_failed, video_cancelled.
    """
    if job.status == "failed":
        reason = job.error_message or "it failed"
        raise ApiError("video_failed", reason, job.error_param, extra={"reason": job.error_code})
    if job.status == "cancelled":
        raise ApiError("video_cancelled", "the video was cancelled", "video_id")
    if job.status != "completed":
        raise ApiError("not_ready", f"the video is {job.status}; wait for completed", "video_id")
