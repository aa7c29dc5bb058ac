"""Contact sheets: many clips in one picture."""

from collections.abc import Collection, Mapping, Sequence
from itertools import count, repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from worldline.video.read import Frames
from worldline.video.write import writing

_SIDE = 192  # largest width and height of a picture
_GAP, _LINE = 4, 14  # pixels between pictures, and of a line of text


def spread(num_frames: int) -> list[int]:
    """Numbers of up to 9 frames evenly spread over a clip, first and last included."""
    return [round(place) for place in np.linspace(0, num_frames - 1, min(9, num_frames))]


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
    sizes = [picture.shape[:2] for row in pictures for picture in row.values()]
    # of the cells of a grid
    height, width = np.add(np.max(sizes, axis=0), (2 * _LINE + _GAP, _GAP)).tolist()
    columns = max(map(len, pictures))
    sheet = Image.new("RGB", (_GAP + columns * width, len(pictures) * height), "white")
    draw = ImageDraw.Draw(sheet)
    tops = count(0, height)
    for top, row, label, marked in zip(tops, pictures, labels, marks or repeat(()), strict=False):
        # Pillow's own font, the only one sure to be there, draws boxes for the rest.
        text = label.encode("ascii", "replace").decode()
        draw.text((_GAP, top + _GAP), text, fill="red" if marked else "black")
        for left, (number, picture) in zip(count(_GAP, width), row.items(), strict=False):
            draw.text((left, top + _LINE), str(number), fill="gray")
            image = Image.fromarray(picture)
            if number in marked:
                image = ImageOps.expand(ImageOps.crop(image, 3), 3, "red")
            sheet.paste(image, (left, top + 2 * _LINE))
    with writing(path) as temporary:
        sheet.save(temporary, format="PNG")
