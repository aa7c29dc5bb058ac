"""What the released commands read: one input, the lines of a JSONL, or a folder of media."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from worldline.errors import InputError
from worldline.family import Item
from worldline.request import Options
from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_kind
from worldline.video.write import ENCODINGS

logger = logging.getLogger(__name__)

VISUAL, PROMPT = "visual_input", "prompt"
_LABEL = 40  # characters of a prompt that names an item
# formats that are not written; another suffix is part of the name
_UNWRITTEN = (".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".3gp")


class PromptFlags(Options):
    """Flags of `diffusion text2world`."""

    batch_input_path: str | None = Field(
        None, description='Many inputs: a JSONL with a "prompt" a line.'
    )
    video_save_name: str = Field(
        "output",
        description="Name of a single video, without .mp4; .mov .mkv .webm .gif choose another "
        "format.",
    )
    video_save_folder: str = Field("outputs/", description="Folder of the videos; made if absent.")
    resume: bool = Field(False, description="Keep videos that an earlier run made in the same way.")


class MediaFlags(PromptFlags):
    """Flags of commands that continue images and videos."""

    input_image_or_video_path: str | None = Field(
        None, description="One input: mp4, mov, mkv, webm, gif, png, jpg…"
    )
    batch_input_path: str | None = Field(
        None,
        description='Many inputs: a JSONL with a "visual_input" (and a "prompt") a line, or a '
        "folder of media.",
    )


class TypedFlags(MediaFlags):
    """Flags of `autoregressive base`."""

    input_prompts_path: str | None = Field(None, description="Another name of --batch_input_path.")
    input_type: Literal["image", "video"] = Field("video", description="Kind of all inputs.")


class TextTypedFlags(TypedFlags):
    """Flags of `autoregressive video2world`."""

    input_type: Literal["text_and_image", "text_and_video"] = Field(  # type: ignore[assignment]
        "text_and_video", description="Kind of all inputs."
    )


@dataclass(frozen=True)
class Lines:
    """Reader of the released commands: one input, or many from a JSONL or a folder.

    Attributes:
        flags: options of the command.
        visual: whether an input is an image or a video.
        prompts: whether the model takes prompts.
    """

    flags: type[PromptFlags]
    visual: bool = True
    prompts: bool = True

    def read(self, flags: Any, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        """Every input, and what is wrong with others."""
        sources = ["batch_input_path"]
        if self.visual:
            sources = ["input_image_or_video_path", *sources]
        if hasattr(flags, "input_prompts_path"):
            sources.append("input_prompts_path")
        named = {name: getattr(flags, name) for name in sources if getattr(flags, name) is not None}
        if len(named) > 1:
            raise InputError(f"--{' and --'.join(named)} exclude each other; give one")
        if "" in named.values():
            raise InputError(f"--{next(iter(named))} is empty; give a path")
        if self.visual and not named:
            raise InputError(f"no input; give --{' or --'.join(sources[:2])}")
        kind = getattr(flags, "input_type", "").removeprefix("text_and_") or None
        if not named or "input_image_or_video_path" in named:
            return [self._single(flags, stated, kind)], []
        [(source, path)] = named.items()
        for name in ("prompt", *(() if self.visual else ("prompt_embeddings",))):
            if name in stated:
                raise InputError(f"--{name} and --{source} exclude each other; give one")
        return self._batch(Path(path), flags, stated, kind)

    def _single(self, flags: Any, stated: Mapping[str, Any], kind: str | None) -> Item:
        if not self.visual and not stated.keys() & {"prompt", "prompt_embeddings"}:
            raise InputError("no prompt; give --prompt, --batch_input_path or --prompt_embeddings")
        path = Path(flags.input_image_or_video_path) if self.visual else None
        label = str(path) if path else label_of(str(stated.get("prompt", "embeddings")))
        output = single_output(flags.video_save_folder, flags.video_save_name)
        return Item(label, "", stated, path, kind_of(path, kind), output)

    def _batch(
        self, path: Path, flags: Any, stated: Mapping[str, Any], kind: str | None
    ) -> tuple[list[Item], list[str]]:
        items: list[Item] = []
        problems: list[str] = []
        unread: set[str] = set()
        entries = _folder(path) if path.is_dir() and self.visual else _lines(path)
        for number, place, line in entries:
            try:
                file, prompt = line if isinstance(line, Path) else None, None
                if isinstance(line, str):
                    file, prompt = self._entry(line, path, unread)
                label = str(file) if file else label_of(prompt or "")
                said = {**stated, **({} if prompt is None else {PROMPT: prompt})}
                output = Path(flags.video_save_folder) / f"{number}.mp4"
                items.append(Item(label, place, said, file, kind_of(file, kind), output))
            except InputError as error:
                problems.append(f"{place}: {error}")
        if unread:
            logger.info("%s: no effect: %s", path, ", ".join(sorted(unread)))
        if not items and not problems:
            raise InputError(f"{path}: it has no input; give a JSONL or a folder of media")
        return items, problems

    def _entry(self, line: str, file: Path, unread: set[str]) -> tuple[Path | None, str | None]:
        """File and prompt of a line; names of other fields are added to `unread`."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error}); give an object a line") from None
        needed = VISUAL if self.visual else PROMPT
        if not isinstance(entry, dict) or not isinstance(entry.get(needed), str):
            example = {needed: "in.mp4" if self.visual else "A ball rolls."}
            raise InputError(f'no "{needed}"; give an object such as {json.dumps(example)}')
        read = {name for name, wanted in ((VISUAL, self.visual), (PROMPT, self.prompts)) if wanted}
        unread |= entry.keys() - read
        prompt = entry.get(PROMPT) if self.prompts else None
        if prompt is not None and not isinstance(prompt, str):
            raise InputError(f'"{PROMPT}" is {json.dumps(prompt)}; give a text')
        return (find_beside(entry[VISUAL], file) if self.visual else None), prompt


def kind_of(path: Path | None, kind: str | None) -> Literal["image", "video"] | None:
    """Kind of an input: as the command states, else by the file's suffix."""
    if path is None or kind is None:
        return None if path is None else media_kind(path)
    return "image" if kind == "image" else "video"


def label_of(prompt: str) -> str:
    """The first words of a prompt."""
    words = " ".join(prompt.split())
    return f"“{words}”" if len(words) <= _LABEL else f"“{words[:_LABEL].rstrip()}…”"


def single_output(folder: str, name: str) -> Path:
    """File of a single video.

    Raises:
        InputError: its format is not written.
    """
    suffix = Path(name).suffix.lower()
    if not Path(name).name or suffix in (*_UNWRITTEN, *IMAGE_SUFFIXES):
        raise InputError(
            f"--video_save_name {name!r}: no such format; give a name, or one with "
            f"{' '.join(ENCODINGS)}"
        )
    return Path(folder) / (name if suffix in ENCODINGS else f"{name}.mp4")


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number, place and text of every line that is not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file}: it is not UTF-8 text; give a JSONL") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; give a JSONL") from None
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            yield number, f"{file} line {number + 1} ({number}.mp4)", line


def _folder(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """Number, place and path of every media file, in the order of names."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    media = [path for path in files if path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)]
    if skipped := [path.name for path in files if path not in media]:
        logger.info("%s: skipped, not media: %s", folder, ", ".join(skipped))
    for number, path in enumerate(media):
        yield number, str(path), path


def find_beside(name: str, file: Path) -> Path:
    """A path from the working directory, else from the folder of the file that names it.

    The released files name their media from the folder that holds `assets/`: a path that begins
    with the name of a folder around the file is looked up beside that folder, too.

    Raises:
        InputError: no such file.
    """
    if not name or "\0" in name:
        raise InputError(f'"{VISUAL}" is {json.dumps(name)}; give the path of a file')
    path = Path(name).expanduser()
    around = file.absolute().parent
    bases = [around, *(up.parent for up in (around, *around.parents) if up.name == path.parts[0])]
    for candidate in (path, *(base / path for base in bases)):
        if candidate.exists():
            return candidate
    raise InputError(f"{name}: no such file, from {Path.cwd()} or beside the JSONL in {around}")


PROMPTS = Lines(PromptFlags, visual=False)
MEDIA = Lines(MediaFlags)
TYPED_MEDIA = Lines(TypedFlags, prompts=False)
TYPED_TEXT_MEDIA = Lines(TextTypedFlags)
