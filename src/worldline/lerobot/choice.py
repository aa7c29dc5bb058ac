"""What is taken of a data set, by its name and its parameters.

`lerobot:FOLDER#camera=NAME&episodes=0-9,12&start=0&stride=2&frames=9`
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from worldline.errors import InputError, brief, did_you_mean
from worldline.files import DATASET, check_path

_NUMBERS = {"start": 0, "stride": 1, "frames": 1}  # parameter -> its least value
_PARAMETERS = ("camera", "episodes", *_NUMBERS)
_LARGEST = 10**9


@dataclass(frozen=True)
class Choice:
    """What is taken of a data set.

    Attributes:
        folder: that holds `meta` and `videos`.
        camera: feature; None where there is one.
        episodes: first and last number of ranges; empty for all.
        start: frame of an episode with which it begins.
        stride: frames from one to the next that is taken.
        frames: number of these, from the first on; None for all.
    """

    folder: Path
    camera: str | None = None
    episodes: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stride: int = 1
    frames: int | None = None

    def takes(self, episode: int) -> bool:
        """Whether an episode is asked for."""
        return not self.episodes or any(low <= episode <= high for low, high in self.episodes)


def parse_choice(name: str) -> Choice:
    """The choice that a name describes.

    Raises:
        InputError: it is of no folder, or has an unknown or wrong parameter.
    """
    words = name[len(DATASET) :]
    place, _, parameters = words.rpartition("#") if "#" in words else (words, "", "")
    if Path(words).is_dir():  # with # in its own name
        place, parameters = words, ""
    if not place.strip():
        raise InputError(f"{name}: it names no folder; give {DATASET}FOLDER#camera=NAME")
    folder = Path(check_path(place)).expanduser()
    stated: dict[str, str] = {}
    for pair in filter(None, parameters.split("&")):
        key, equals, value = pair.partition("=")
        if key not in _PARAMETERS:
            near = did_you_mean(key, _PARAMETERS, 0.5)
            known = near or f"; give {', '.join(_PARAMETERS)}"
            raise InputError(f"{name}: {key!r:.40} is no parameter of a data set{known}")
        if key in stated:
            raise InputError(f"{name}: {key} stands there twice; give it once")
        if not equals or not value.strip():
            raise InputError(f"{name}: {key} has no value; give {key}=VALUE")
        stated[key] = unquote(value).strip()

    def number(key: str, least: int) -> int:
        text = stated[key]
        if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not least <= int(text) <= _LARGEST:
            raise InputError(
                f"{name}: {key} is {brief(text, 40)}; give a whole number, {least} at least"
            )
        return int(text)

    numbers = {key: number(key, least) for key, least in _NUMBERS.items() if key in stated}
    episodes = _ranges(name, stated["episodes"]) if "episodes" in stated else ()
    return Choice(folder, stated.get("camera"), episodes, **numbers)


def _ranges(name: str, text: str) -> tuple[tuple[int, int], ...]:
    """First and last numbers of ranges such as 0-9,12."""
    ranges = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9}))?\s*", piece, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise InputError(
                f"{name}: episodes has {brief(piece, 40)}; give numbers such as 0-9,12"
            )
        ranges.append((low, high))
    return tuple(ranges)
