"""Contact sheets: many clips in one picture."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldline.video.read import Frames
from worldline.video.write import write_bytes

_SIDE = 192  # largest width and height of a picture
_GAP, _LINE = 4, 14  # pixels between pictures, and of a line of text


def spread(count: int, also: Collection[int] = ()) -> list[int]:
    """Numbers of up to 9 frames evenly spread over a clip, first and last included."""
    picks = np.linspace(0, count - 1, min(9, count)).round().astype(int)
    return sorted({*picks.tolist(), *also})


def thumbnail(frame: Frames) -> Frames:
    """Frame (H, W, 3) as it fits into a contact sheet; a small one is not enlarged."""
    height, width = frame.shape[:2]
    scale = min(1.0, _SIDE / width, _SIDE / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def contact_sheet(
    rows: Sequence[Frames | Mapping[int, Frames]],
    path: str | Path,
    labels: Sequence[str],
    marks: Sequence[Collection[int]] = (),
) -> None:
    """Write a PNG with a labelled row for each clip, the number of its frame above each picture.

    Args:
        rows: clips, of which frames are picked; or pictures by the number of their frame.
        path: of the PNG.
        labels: one a row.
        marks: for each row, numbers of pictures with a red border.

    Raises:
        InputError: the place cannot be written.
        Error: the disk is full.
    """
    font = ImageFont.load_default()
    strips: list[Image.Image] = []
    for row, label, marked in zip_longest(rows, labels, marks, fillvalue=()):
        assert isinstance(label, str)
        if not isinstance(row, Mapping):
            row = {index: thumbnail(row[index]) for index in spread(len(row))}
        width = max(picture.shape[1] for picture in row.values())
        height = max(picture.shape[0] for picture in row.values())
        size = _GAP + len(row) * (width + _GAP), 2 * _LINE + height + _GAP
        strip = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(strip)
        # Pillow's own font, the only one sure to be there, draws boxes for the rest.
        text = label.encode("ascii", "replace").decode()
        draw.text((_GAP, _GAP), text, fill="red" if marked else "black", font=font)
        left = _GAP
        for index, picture in row.items():
            draw.text((left, _LINE), str(index), fill="gray", font=font)
            strip.paste(Image.fromarray(picture), (left, 2 * _LINE))
            if index in marked:
                corner = left + picture.shape[1] - 1, 2 * _LINE + picture.shape[0] - 1
                draw.rectangle((left, 2 * _LINE, *corner), outline="red", width=3)
            left += width + _GAP
        strips.append(strip)
    size = max(strip.width for strip in strips), sum(strip.height for strip in strips)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    write_bytes(path, file.getbuffer())
