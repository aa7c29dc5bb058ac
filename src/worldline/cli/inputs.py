"""What commands read: one input, the lines of a released JSONL, or a folder of media."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from worldline.documents import MAX_PROBLEMS, read_entries
from worldline.errors import InputError, brief, strerror
from worldline.family import Item
from worldline.files import check_path, file_name, is_dataset, refuse_dataset
from worldline.request import BatchFlags, Source, Text, VideoFlags
from worldline.request import Path as Named

if TYPE_CHECKING:
    from worldline.video.span import Span

logger = logging.getLogger(__name__)

VISUAL, PROMPT, EMBEDDINGS = "visual_input", "prompt", "prompt_embeddings"
_SOURCES = ("input_image_or_video_path", "batch_input_path", "input_prompts_path")
_LABEL = 40  # characters of a prompt that names an item
# names of VISUAL in files of other releases
_OTHER_NAMES = ("input_video", "input_image", "input_path")


class PromptFlags(BatchFlags, VideoFlags):
    """Flags of `diffusion text2world`."""

    batch_input_path: Source | None = Field(
        None,
        description='Many inputs: a JSONL with a "prompt" a line, or tasks of lerobot:FOLDER.',
    )
    video_save_name: Annotated[Text, AfterValidator(file_name)] = Field(
        "output", description="Name of a single video; .mov .mkv .webm .gif are other formats."
    )
    video_save_folder: Named = Field(
        "outputs/", description="Folder of the videos; made if absent."
    )


class MediaFlags(PromptFlags):
    """Flags of commands that continue images and videos."""

    input_image_or_video_path: Named | None = Field(
        None, description="One input: a video or an image, by its contents: mp4, mkv, gif, jpg…"
    )
    batch_input_path: Source | None = Field(
        None,
        description='Many: a JSONL of "visual_input" (and "prompt"), a folder of media, or '
        "episodes of lerobot:FOLDER#camera=NAME&episodes=0-9&start=0&stride=2&frames=9.",
    )


class TypedFlags(MediaFlags):
    """Flags of `autoregressive base`."""

    input_prompts_path: Source | None = Field(
        None, description="Another name of --batch_input_path."
    )
    input_type: Literal["image", "video"] = Field("video", description="Kind of all inputs.")


class TextTypedFlags(TypedFlags):
    """Flags of `autoregressive video2world`."""

    input_type: Literal["text_and_image", "text_and_video"] = Field(  # type: ignore[assignment]
        "text_and_video", description="Kind of all inputs."
    )


class OneFlags(VideoFlags):
    """Argument and flags of `worldline generate WORLD`."""

    input: Named | None = Field(None, json_schema_extra={"argument": True})
    output: Named = Field(
        "output.mp4",
        description="File of the video: .mp4, .mov, .mkv, .webm or .gif.",
        json_schema_extra={"short": "-o"},
    )


class One:
    """Reader of `worldline generate`: an image or a video to continue, or none."""

    flags = OneFlags

    def read(self, flags: OneFlags, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        return [make_item(stated, flags.input, None, Path(flags.output))], []


@dataclass(frozen=True)
class Lines:
    """Reader of the released commands: one input, or many from a JSONL or a folder."""

    flags: type[PromptFlags]
    fields: tuple[str, ...] = (VISUAL, PROMPT)  # of a line, with effect
    needed: tuple[str, ...] = (VISUAL,)  # in every line; --prompt_embeddings stand for prompts

    def read(self, flags: Any, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        visual, input_type = VISUAL in self.fields, getattr(flags, "input_type", None)
        paths = {name: path for name in _SOURCES if (path := getattr(flags, name, None))}
        if len(paths) > 1:
            raise InputError(f"--{' and --'.join(paths)} exclude each other; give one")
        if visual and not paths:
            raise InputError(f"no input; give --{_SOURCES[0]} or --{_SOURCES[1]}")
        single = paths.pop(_SOURCES[0], None)
        if not paths:
            if PROMPT in self.needed and not stated.keys() & {PROMPT, EMBEDDINGS}:
                raise InputError(f"no prompt; give --{PROMPT}, --{_SOURCES[1]} or --{EMBEDDINGS}")
            output = single_output(flags.video_save_folder, flags.video_save_name)
            return [make_item(stated, single, input_type, output)], []
        [(source, path)] = paths.items()
        for name in (PROMPT,) if visual else (PROMPT, EMBEDDINGS):
            # a prompt takes the place of tasks
            if name in stated and not (visual and is_dataset(path)):
                raise InputError(f"--{name} and --{source} exclude each other; give one")
        if "video_save_name" in flags.model_fields_set:
            logger.info("--video_save_name has no effect: videos of a batch are numbered")
        if is_dataset(path):
            return self._episodes(path, flags.video_save_folder, stated, input_type)
        refuse_dataset(Path(path))
        return self._batch(Path(path), flags.video_save_folder, stated, input_type)

    def _batch(
        self, path: Path, folder: str, stated: Mapping[str, Any], input_type: str | None
    ) -> tuple[list[Item], list[str]]:
        items: list[Item] = []
        problems: list[str] = []
        unread: set[str] = set()
        needed = [name for name in self.needed if name != PROMPT or EMBEDDINGS not in stated]
        rows: Iterable[tuple[int, str, Any]] = read_rows(path)
        if path.is_dir() and PROMPT not in needed:
            files = enumerate(map(str, list_files(path)))
            rows = [(number, file, {VISUAL: file}) for number, file in files]
        for number, place, row in rows:
            if len(problems) >= MAX_PROBLEMS:
                break
            try:
                entry = check_row(row, needed)
                unread |= entry.keys() - set(self.fields)
                fields = {PROMPT: entry.get(PROMPT), **stated} if PROMPT in self.fields else stated
                file = find_beside(entry[VISUAL], path) if VISUAL in needed else None
                output = Path(folder, f"{number}.mp4")
                items.append(make_item(fields, file, input_type, output, place, (path,)))
            except InputError as error:
                problems.append(f"{place}: {error}")
        if unread:
            logger.info("%s: no effect: %s", path, ", ".join(sorted(unread)))
        if not items and not problems:
            raise InputError(f"{path}: it has no input; give a JSONL or a folder of media")
        return items, problems

    def _episodes(
        self, name: str, folder: str, stated: Mapping[str, Any], input_type: str | None
    ) -> tuple[list[Item], list[str]]:
        """A video of each episode of a data set; its task is the prompt."""
        from worldline.lerobot.dataset import open_dataset

        items, problems, visual = list[Item](), list[str](), VISUAL in self.needed
        dataset = open_dataset(name, videos=visual)
        needs_prompt = PROMPT in self.needed and EMBEDDINGS not in stated
        for index, found in dataset.spans():
            if isinstance(found, InputError):
                problems.append(str(found))
                continue
            episode, span = found
            output = Path(folder, f"{episode.name}.mp4")
            place, fields = f"{dataset.place(index)} ({output.name})", dict(stated)
            if PROMPT in self.fields and episode.task:
                fields = {PROMPT: episode.task, **stated}
            elif needs_prompt and PROMPT not in stated:
                problems.append(
                    f"{place}: it has no task; give --{PROMPT} for all, or other episodes"
                )
                continue
            if visual and dataset.choice.frames is not None:
                fields = {"num_input_frames": dataset.choice.frames, **fields}
            items.append(make_item(fields, span, input_type, output, place, dataset.sources))
        return items, problems[:MAX_PROBLEMS]


def check_row(row: Any, needed: Sequence[str]) -> dict[str, Any]:
    """The object of one input, with a text for each of the needed fields."""
    if isinstance(row, ValueError):
        raise InputError(f"not JSON ({row}); give an object a line")
    if not isinstance(row, dict):
        raise InputError(f"not an object; give one with {' and '.join(needed)}")
    wrong = [name for name in needed if not isinstance(row.get(name), str)]
    if wrong:
        values = [f'"{n}" is {brief(row[n])}' if n in row else f'no "{n}"' for n in wrong]
        renamed = [f'rename "{n}"' for n in _OTHER_NAMES if n in row and VISUAL in wrong]
        raise InputError(f"{', '.join(values)}; {', '.join(renamed) or 'give a text'}")
    return row


def make_item(
    stated: Mapping[str, Any],
    file: "str | Path | Span | None",
    input_type: str | None,
    output: Path,
    place: str = "",
    sources: tuple[Path, ...] = (),
) -> Item:
    """One video; it is named by its file, else by the first words of its prompt."""
    if file is None:
        words = shorten(str(stated.get(PROMPT, "embeddings")), _LABEL, placeholder="…")
        return Item(f"“{words}”", place, stated, None, None, output, sources=sources)
    from worldline.video.read import media_kind  # imports PyAV, for which --help must not wait

    kind = media_kind(Path(file))
    if input_type is not None and not input_type.endswith(kind):
        other = input_type.replace("image" if kind == "video" else "video", kind)
        raise InputError(f"{file} is of kind {kind}; give --input_type {other}")
    path = Path(file) if isinstance(file, str) else file
    return Item(str(file), place, stated, path, kind, output, sources=sources)


def single_output(folder: str, name: str) -> Path:
    """File of a single video, in a format that is written."""
    from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES
    from worldline.video.write import ENCODINGS

    # a suffix of no media is part of the name
    suffix, read = Path(name).suffix.lower(), {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}
    if suffix in read - ENCODINGS.keys():
        known = " ".join(ENCODINGS)
        raise InputError(f"--video_save_name {name!r}: give a name, or one with {known}")
    return Path(folder) / (name if suffix in ENCODINGS else f"{name}.mp4")


def read_rows(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of every line of a JSONL, or of every item of a JSON document."""
    try:
        for kind, number, value in read_entries(file):
            yield number - 1, f"{file} {kind or 'item'} {number} ({number - 1}.mp4)", value
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {strerror(error)}; give a JSONL") from None


def list_files(folder: Path, suffixes: Collection[str] = ()) -> list[Path]:
    """Files of a folder with one of these suffixes, by default media; others are logged.

    What is named like media is listed whatever it is, so that it is refused by name.
    """
    from worldline.video.read import kind_in_folder

    paths, skipped = [], []
    for path in sorted(folder.iterdir()):
        if path.name[0] == ".":
            continue
        if path.suffix.lower() in suffixes if suffixes else kind_in_folder(path):
            paths.append(path)
        elif not path.is_dir():
            skipped.append(path.name)
    if skipped:
        logger.info("%s: skipped: %s", folder, ", ".join(skipped))
    return paths


def find_beside(name: str, file: Path) -> Path:
    """A path from the working directory, else from the folder of the file that names it.

    The released files name their media from the folder that holds `assets/`: a path that begins
    with the name of a folder around the file is looked up beside that folder, too.
    """
    try:
        path, around = Path(check_path(name)).expanduser(), file.absolute().parent
    except RuntimeError as error:  # ~ of no user
        raise InputError(f"{VISUAL}: {error}") from None
    above = [up.parent for up in (around, *around.parents) if (up.name,) == path.parts[:1]]
    for candidate in (path, around / path, *(folder / path for folder in above)):
        if candidate.exists():
            return candidate
    raise InputError(f"{name}: no such file here, nor beside {file.name}")


PROMPTS = Lines(PromptFlags, (PROMPT,), (PROMPT,))
ONE = One()
MEDIA = Lines(MediaFlags)
TYPED_MEDIA = Lines(TypedFlags, (VISUAL,))
TYPED_TEXT_MEDIA = Lines(TextTypedFlags, needed=(VISUAL, PROMPT))
