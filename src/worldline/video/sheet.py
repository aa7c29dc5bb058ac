"""Contact sheets: many clips in one picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from worldline.video.read import Frames
from worldline.video.write import writing

_SIDE = 192  # largest width and height of a picture
_GAP, _LINE = 4, 14  # pixels between pictures, and of a line of text


def spread(count: int) -> list[int]:
    """Numbers of up to 9 frames evenly spread over a clip, first and last included."""
    picks: list[int] = np.linspace(0, count - 1, min(9, count)).round().astype(int).tolist()
    return picks


def thumbnail(frame: Frames) -> Frames:
    """Frame (H, W, 3) as it fits into a contact sheet; a small one is not enlarged."""
    picture = Image.fromarray(frame)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def contact_sheet(
    rows: Sequence[Frames | Mapping[int, Frames]],
    path: str | Path,
    labels: Sequence[str],
    marks: Sequence[Collection[int]] = (),
) -> None:
    """Write a PNG with a labelled row for each clip, the number of its frame above each picture.

    Args:
        rows: clips, of which frames are picked; or pictures by the number of their frame.
        path: file of the PNG, written as by `write_bytes`.
        labels: one a row.
        marks: for each row, numbers of pictures with a red border.
    """
    pictures = [
        row if isinstance(row, Mapping) else {n: thumbnail(row[n]) for n in spread(len(row))}
        for row in rows
    ]
    sizes = [next(iter(row.values())).shape for row in pictures]
    width = max(len(row) * (size[1] + _GAP) for row, size in zip(pictures, sizes, strict=True))
    height = sum(2 * _LINE + size[0] + _GAP for size in sizes)
    sheet = Image.new("RGB", (_GAP + width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, label, marked in zip(pictures, labels, marks or repeat(()), strict=False):
        # Pillow's own font, the only one sure to be there, draws boxes for the rest.
        text = label.encode("ascii", "replace").decode()
        draw.text((_GAP, top + _GAP), text, fill="red" if marked else "black")
        left, top = _GAP, top + 2 * _LINE
        for number, picture in row.items():
            height, width = picture.shape[:2]
            draw.text((left, top - _LINE), str(number), fill="gray")
            sheet.paste(Image.fromarray(picture), (left, top))
            if number in marked:
                corner = left + width - 1, top + height - 1
                draw.rectangle((left, top, *corner), outline="red", width=3)
            left += width + _GAP
        top += height + _GAP
    with writing(path) as temporary:
        sheet.save(temporary, format="PNG")
