"""What a run continues: one file, the lines of a JSONL, or a folder of media; no torch.

All that is wrong with a batch is found before anything is loaded, and told at once.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldline.errors import InputError
from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Kind, probe

logger = logging.getLogger(__name__)

EXAMPLE = "assets/autoregressive/batch_inputs/base.jsonl"
FIELD = "visual_input"


@dataclass(frozen=True)
class Item:
    """One clip or image to continue.

    Attributes:
        number: 0-based line in the JSONL, or place in the folder; names the output.
        path: the file, found.
    """

    number: int
    path: Path


def read_single(path: str | Path, kind: Kind, num_input_frames: int) -> Item:
    """Check a single input.

    Raises:
        InputError: it is no readable media of this kind, or too short.
    """
    _check(Path(path), kind, num_input_frames)
    return Item(0, Path(path))


def read_batch(path: str | Path, kind: Kind, num_input_frames: int) -> list[Item]:
    """Check every input of a JSONL file, or of a folder of media in the order of their names.

    Args:
        path: the file, one object with the field `visual_input` a line, or the folder.
        kind: what all inputs must be.
        num_input_frames: how many frames a video must have.

    Raises:
        InputError: something is wrong; all bad lines are in the message.
    """
    path = Path(path)
    if path.is_dir():
        items, problems = _read_folder(path, kind, num_input_frames)
    else:
        items, problems = _read_lines(path, kind, num_input_frames)
    if problems:
        count = len(problems) + len(items)
        told = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(
            f"{path}: {len(problems)} of {count} inputs cannot be used, so none was run\n{told}"
        )
    if not items:
        raise InputError(
            f"{path} holds no media" if path.is_dir() else f"{path} has no line with an input"
        )
    return items


def _read_folder(folder: Path, kind: Kind, num_input_frames: int) -> tuple[list[Item], list[str]]:
    items: list[Item] = []
    problems: list[str] = []
    passed_over: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            passed_over.append(path.name)
            continue
        try:
            _check(path, kind, num_input_frames)
        except InputError as error:
            problems.append(str(error))
        else:
            items.append(Item(len(items), path))
    if passed_over:
        logger.info("%s: no media, passed over: %s", folder, ", ".join(passed_over))
    return items, problems


def _read_lines(file: Path, kind: Kind, num_input_frames: int) -> tuple[list[Item], list[str]]:
    items: list[Item] = []
    problems: list[str] = []
    ignored: set[str] = set()
    for number, line in enumerate(_lines(file)):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
            ignored |= entry.keys() - {FIELD}
            path = _find(entry[FIELD], file)
            _check(path, kind, num_input_frames)
        except InputError as error:
            problems.append(f"line {number + 1}: {error}")
        else:
            items.append(Item(number, path))
    if ignored:
        names = ", ".join(sorted(ignored))
        logger.info("%s: no effect on a base model: %s", file, names)
    return items, problems


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file or folder") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text; --batch_input_path takes a JSONL") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _parse(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f'not an object like {{"{FIELD}": "in.mp4"}}')
    if FIELD not in entry:
        raise InputError(f'no "{FIELD}"; {EXAMPLE} is an example of such a file')
    if not isinstance(entry[FIELD], str) or not entry[FIELD] or "\0" in entry[FIELD]:
        raise InputError(f'"{FIELD}" must be the path of a file, not {json.dumps(entry[FIELD])}')
    return entry


def _find(name: str, file: Path) -> Path:
    """Look a path up from the working directory, then beside the JSONL.

    The released files name their media from the folder that holds `assets/`: so a path that begins
    with the name of a folder around the JSONL is also looked up beside that folder.
    """
    path = Path(name).expanduser()
    around = file.absolute().parent
    bases = [around, *(up.parent for up in (around, *around.parents) if up.name == path.parts[0])]
    candidates = [path, *(base / path for base in bases)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if path.is_absolute():
        return path
    raise InputError(f"{name}: no such file, from {Path.cwd()} or beside the JSONL in {around}")


def _check(path: Path, kind: Kind, num_input_frames: int) -> None:
    info = probe(path, kind=kind)
    if info.frames < num_input_frames:
        frames = f"{info.frames} frame{'s' if info.frames > 1 else ''}"
        raise InputError(f"{path} has {frames}, but --num_input_frames is {num_input_frames}")
