"""What the released commands read: one input, the lines of a JSONL, or a folder of media."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from worldline.errors import InputError
from worldline.family import Item
from worldline.request import Options

logger = logging.getLogger(__name__)

VISUAL, PROMPT = "visual_input", "prompt"
_EXAMPLE = {VISUAL: "in.mp4", PROMPT: "A ball rolls."}
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
        fields: of a line that have an effect.
        needed: those that every line has; --prompt_embeddings stand for all prompts.
    """

    flags: type[PromptFlags]
    fields: tuple[str, ...] = (VISUAL, PROMPT)
    needed: tuple[str, ...] = (VISUAL,)

    @property
    def visual(self) -> bool:
        return VISUAL in self.fields

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
        kind = getattr(flags, "input_type", None)
        if not named or "input_image_or_video_path" in named:
            return [self._single(flags, stated, kind)], []
        [(source, path)] = named.items()
        for name in ("prompt", *(() if self.visual else ("prompt_embeddings",))):
            if name in stated:
                raise InputError(f"--{name} and --{source} exclude each other; give one")
        return self._batch(Path(path), flags, stated, kind)

    def _single(self, flags: Any, stated: Mapping[str, Any], kind: str | None) -> Item:
        if PROMPT in self.needed and not stated.keys() & {"prompt", "prompt_embeddings"}:
            raise InputError("no prompt; give --prompt, --batch_input_path or --prompt_embeddings")
        path = Path(flags.input_image_or_video_path) if self.visual else None
        label = str(path) if path else label_of(str(stated.get("prompt", "embeddings")))
        output = single_output(flags.video_save_folder, flags.video_save_name)
        return Item(label, "", stated, path, kind_of(path, kind), output)

    def _batch(
        self, path: Path, flags: Any, stated: Mapping[str, Any], kind: str | None
    ) -> tuple[list[Item], list[str]]:
        if "video_save_name" in flags.model_fields_set:
            logger.info("--video_save_name has no effect: videos of a batch are numbered")
        items: list[Item] = []
        problems: list[str] = []
        unread: set[str] = set()
        embedded = "prompt_embeddings" in stated
        needed = [name for name in self.needed if name != PROMPT or not embedded]
        entries = _folder(path) if path.is_dir() and PROMPT not in needed else _lines(path)
        for number, place, line in entries:
            try:
                file, prompt = line if isinstance(line, Path) else None, None
                if isinstance(line, str):
                    file, prompt = self._entry(line, path, needed, unread)
                label = str(file) if file else label_of(prompt or "")
                values = {**stated, **({} if prompt is None else {PROMPT: prompt})}
                output = Path(flags.video_save_folder) / f"{number}.mp4"
                item = Item(
                    label, place, values, file, kind_of(file, kind), output, sources=(path,)
                )
                items.append(item)
            except InputError as error:
                problems.append(f"{place}: {error}")
        if unread:
            logger.info("%s: no effect: %s", path, ", ".join(sorted(unread)))
        if not items and not problems:
            raise InputError(f"{path}: it has no input; give a JSONL or a folder of media")
        return items, problems

    def _entry(
        self, line: str, file: Path, needed: Sequence[str], unread: set[str]
    ) -> tuple[Path | None, str | None]:
        """File and prompt of a line; names of other fields are added to `unread`."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error}); give an object a line") from None
        example = json.dumps({name: _EXAMPLE[name] for name in needed})
        if not isinstance(entry, dict):
            raise InputError(f"not an object; give one such as {example}")
        unread |= entry.keys() - set(self.fields)
        read = {name: entry[name] for name in self.fields if name in entry}
        if missing := [f'"{name}"' for name in needed if name not in read]:
            raise InputError(f"no {' and no '.join(missing)}; give an object such as {example}")
        for name, value in read.items():
            if not isinstance(value, str):
                raise InputError(f'"{name}" is {json.dumps(value)}; give a text')
        return (find_beside(read[VISUAL], file) if self.visual else None), read.get(PROMPT)


def kind_of(path: Path | None, input_type: str | None) -> Literal["image", "video"] | None:
    """Kind of an input by its suffix; `input_type`, where the command has one, must agree."""
    from worldline.video.read import media_kind  # imports PyAV, for which --help must not wait

    if path is None:
        return None
    kind: Literal["image", "video"] = media_kind(path)
    if input_type is not None and not input_type.endswith(kind):
        other = input_type.replace("image" if kind == "video" else "video", kind)
        raise InputError(f"{path} is of kind {kind}; give --input_type {other}")
    return kind


def label_of(prompt: str) -> str:
    """The first words of a prompt."""
    words = " ".join(prompt.split())
    return f"“{words}”" if len(words) <= _LABEL else f"“{words[:_LABEL].rstrip()}…”"


def single_output(folder: str, name: str) -> Path:
    """File of a single video.

    Raises:
        InputError: its format is not written.
    """
    from worldline.video.read import IMAGE_SUFFIXES
    from worldline.video.write import ENCODINGS

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
    from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES

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


PROMPTS = Lines(PromptFlags, (PROMPT,), (PROMPT,))
MEDIA = Lines(MediaFlags)
TYPED_MEDIA = Lines(TypedFlags, (VISUAL,))
TYPED_TEXT_MEDIA = Lines(TextTypedFlags, needed=(VISUAL, PROMPT))
