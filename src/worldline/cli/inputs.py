"""What a run starts from: one input, the lines of a JSONL, or a folder of media; no torch.

All that is wrong with a batch is found before anything is loaded, and told at once.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from worldline.errors import InputError
from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Kind, media_kind, probe

logger = logging.getLogger(__name__)

VISUAL, PROMPT = "visual_input", "prompt"
_SHOWN = 40  # most letters of a prompt that names an item


@dataclass(frozen=True)
class Fields:
    """What a command reads of every input.

    Attributes:
        visual: what `visual_input` must be; "either" goes by the suffix, None reads none.
        num_input_frames: how many frames it must have.
        prompt: whether the input needs a `prompt`, may have one, or has no use for it.
        model: what reads them, in words.
        example: a released file of such lines.
        type_prefix: what stands before "image" or "video" in the choices of --input_type.
    """

    visual: Kind | Literal["either"] | None
    num_input_frames: int = 1
    prompt: Literal["required", "optional", "unused"] = "unused"
    model: str = "base model"
    example: str = "assets/autoregressive/batch_inputs/base.jsonl"
    type_prefix: str = ""

    @property
    def names(self) -> set[str]:
        """Names of the fields that have an effect."""
        read = {VISUAL} if self.visual else set()
        return read if self.prompt == "unused" else {*read, PROMPT}

    @property
    def sample(self) -> str:
        """A line that would do."""
        line = {VISUAL: "in.mp4"} if self.visual else {}
        return json.dumps(
            {**line, PROMPT: "A ball…"} if self.prompt == "required" else line, ensure_ascii=False
        )


@dataclass(frozen=True)
class Item:
    """One clip or image to continue, one prompt to show, or both.

    Attributes:
        number: 0-based line in the JSONL, or place in the folder; names the output.
        path: the file, found; None where the model reads none.
        prompt: what the video shows; None where there is none.
        name: that it is called by, where it has one.
    """

    number: int
    path: Path | None = None
    prompt: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        if self.path is not None:
            return str(self.path)
        if self.prompt is None:
            return "embeddings"
        words = " ".join(self.prompt.split())
        return f"“{words}”" if len(words) <= _SHOWN else f"“{words[:_SHOWN].rstrip()}…”"


def read_single(path: str | Path | None, fields: Fields, prompt: str | None = None) -> Item:
    """Check a single input.

    Raises:
        InputError: it is no readable media of this kind, or too short; the prompt is empty, no
            text, or missing where one is needed.
    """
    if prompt is not None:
        _check_prompt(prompt, "--prompt")
    if prompt is None and fields.prompt == "required":
        raise InputError(f"no prompt: a {fields.model} needs --prompt")
    if path is None:
        return Item(0, None, prompt)
    _check(Path(path), fields)
    return Item(0, Path(path), prompt)


def read_batch(path: str | Path, fields: Fields) -> list[Item]:
    """Check every input of a JSONL file, or of a folder of media in the order of their names.

    Args:
        path: the file, one object a line, or the folder.
        fields: what the object must hold.

    Raises:
        InputError: something is wrong; all bad lines are in the message.
    """
    path = Path(path)
    if path.is_dir():
        if VISUAL not in fields.names or fields.prompt == "required":
            raise InputError(
                f"{path} is a folder, which holds no prompts; give a JSONL with lines like "
                f"{fields.sample}"
            )
        items, problems = _read_folder(path, fields)
    else:
        items, problems = _read_lines(path, fields)
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


def _read_folder(folder: Path, fields: Fields) -> tuple[list[Item], list[str]]:
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
            _check(path, fields)
        except InputError as error:
            problems.append(str(error))
        else:
            items.append(Item(len(items), path))
    if passed_over:
        logger.info("%s: no media, passed over: %s", folder, ", ".join(passed_over))
    return items, problems


def _read_lines(file: Path, fields: Fields) -> tuple[list[Item], list[str]]:
    items: list[Item] = []
    problems: list[str] = []
    ignored: set[str] = set()
    for number, line in enumerate(_lines(file)):
        if not line.strip():
            continue
        try:
            entry = _parse(line, fields)
            ignored |= entry.keys() - fields.names
            path = _find(entry[VISUAL], file) if fields.visual else None
            if path is not None:
                _check(path, fields)
            prompt = None if fields.prompt == "unused" else entry.get(PROMPT)
        except InputError as error:
            problems.append(f"line {number + 1}: {error} (output {number}.mp4)")
        else:
            items.append(Item(number, path, prompt))
    if ignored:
        names = ", ".join(sorted(ignored))
        logger.info("%s: no effect on a %s: %s", file, fields.model, names)
    return items, problems


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file or folder") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; a batch is a JSONL of it") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _parse(line: str, fields: Fields) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f"not an object like {fields.sample}")
    needed = fields.names if fields.prompt == "required" else fields.names - {PROMPT}
    missing = [name for name in (VISUAL, PROMPT) if name in needed and name not in entry]
    if missing:
        names = " and no ".join(f'"{name}"' for name in missing)
        raise InputError(
            f"no {names}; a line is like {fields.sample}, as in the released {fields.example}"
        )
    if fields.visual:
        name = entry[VISUAL]
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f'"{VISUAL}" must be the path of a file, not {json.dumps(name)}')
    if fields.prompt != "unused" and PROMPT in entry:
        prompt = entry[PROMPT]
        if not isinstance(prompt, str):
            raise InputError(f'"{PROMPT}" must be a text, not {json.dumps(prompt)}')
        _check_prompt(prompt, f'"{PROMPT}"')
    return entry


def _check_prompt(prompt: str, name: str) -> None:
    if not prompt.strip():
        raise InputError(f"{name} is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, or bytes that are no UTF-8
        raise InputError(f"{name} is no valid text: {error}") from None


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


def _check(path: Path, fields: Fields) -> None:
    assert fields.visual is not None
    kind = media_kind(path) if fields.visual == "either" else fields.visual
    prefix = fields.type_prefix
    if prefix and path.is_file() and (found := media_kind(path)) != kind:
        article = "an image" if found == "image" else "a video"
        raise InputError(
            f"{path} is {article}, but --input_type is {prefix}{kind}; "
            f"use --input_type {prefix}{found}"
        )
    info = probe(path, kind=kind)
    if info.frames < fields.num_input_frames:
        frames = f"{info.frames} frame{'s' if info.frames > 1 else ''}"
        what = f"is an image, which has {frames}" if kind == "image" else f"has {frames}"
        raise InputError(f"{path} {what}, but --num_input_frames is {fields.num_input_frames}")
