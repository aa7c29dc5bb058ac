"""`worldline tokenize`: clips and images to latents or token ids, and back.

A clip of any length is coded as one, piece by piece, so that there is no seam and no limit.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worldline.cli.batch import check_folder, memory_advice, report_done, run_each
from worldline.cli.options import options, parsed
from worldline.cli.run import refuse_problems
from worldline.errors import CheckpointError, Error, InputError
from worldline.files import folded, read_json, stamp
from worldline.request import LoadOptions, Options
from worldline.request import Path as Named
from worldline.shapes import VideoShape

if TYPE_CHECKING:
    from torch import Tensor

    from worldline.family import Compute
    from worldline.tokenizers.cosmos.model import CosmosTokenizer
    from worldline.tokenizers.cosmos.weights import CosmosNetwork
    from worldline.video.read import Frames

logger = logging.getLogger(__name__)

LATENTS, TOKENS = "latents", "tokens"  # names of the tensor in a file
_SUFFIX = ".safetensors"
_FPS = 24.0  # where neither clip nor header states a rate


class DecodeFlags(Options):
    """Flags of `tokenize decode`."""

    tokenizer_dir: Named | None = Field(
        None,
        description="Tokenizer folder below --checkpoint_dir, a path, or tiny-… for a bundled one."
        "  [default: the one named in the INPUTS]",
    )
    output_dir: Named = Field("outputs", description="Folder of the results; made if absent.")
    resume: bool = Field(False, description="Keep results of an earlier run of equal inputs.")


class EncodeFlags(DecodeFlags):
    """Flags of `tokenize encode`."""

    tokenizer_dir: Named = Field(
        "Cosmos-Tokenize1-CV8x8x8-720p",
        description="Tokenizer folder below --checkpoint_dir, a path, or tiny-… for a bundled one; "
        "`worldline models` lists them.",
    )


class ReconstructFlags(Options):
    """Flags of cosmos-predict1 `tokenizer/inference/video_cli.py`."""

    video_pattern: Named | None = Field(
        None, description="Clips and images, such as 'clips/*.mp4'."
    )
    checkpoint: Named | None = Field(
        None,
        description="Tokenizer: its folder, a file that holds all of it, or tiny-… for a bundled "
        "one.",
    )
    checkpoint_enc: Named | None = Field(
        None, description="File of its encoder; needs --checkpoint_dec."
    )
    checkpoint_dec: Named | None = Field(None, description="File of its decoder.")
    tokenizer_type: (
        Literal["CV8x8x8-720p", "DV8x16x16-720p", "CV4x8x8-360p", "DV4x8x8-360p"] | None
    ) = Field(None, description="A released one, below --checkpoint_dir.")
    mode: Literal["jit", "torch"] | None = Field(
        None, description="No effect: both are read the same way."
    )
    short_size: Annotated[int, Field(ge=2, le=8192)] | None = Field(
        None, description="Scale the short side to this."
    )
    temporal_window: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Frames coded apart from all others, with seams.  [default: the whole clip]",
    )
    output_dir: Named | None = Field(
        None, description="Folder of the results.  [default: `reconstructions` beside each input]"
    )
    output_fps: Annotated[float, Field(ge=0.01, le=1e4)] | None = Field(
        None, description="Frames per second.  [default: the clip's own]"
    )
    save_input: bool = Field(False, description="Write the encoded frames too: NAME_input.mp4.")


class Header(BaseModel):
    """Metadata beside latents or tokens; sizes are of the clip before padding, 0 if unknown."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    tokenizer: str = ""
    media: Literal["image", "video"] = "video"
    frames: int = Field(default=0, ge=0)
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)
    fps: float = Field(_FPS, ge=0.01, le=1e4)
    source: str = ""  # path of the clip

    @property
    def shape(self) -> VideoShape | None:
        known = self.frames and self.height and self.width
        return VideoShape(self.frames, self.height, self.width) if known else None


@dataclass(frozen=True)
class Task:
    """One file to make.

    Attributes:
        path: input: a clip, an image, or a file of latents or tokens.
        output: result.
        header: metadata beside stored input, or for the result.
        kind: name of the tensor in the input; "" for pixels.
        stored: its dtype and shape, on the meta device.
    """

    path: Path
    output: Path
    header: Header
    kind: str = ""
    stored: Tensor | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Coder:
    """A tokenizer, not loaded yet, and how it will run."""

    name: str
    opened: CosmosNetwork
    compute: Compute

    def fingerprint(self, task: Task) -> str:
        """Hash of all that decides a result; --resume compares it."""
        files = [stamp(path) for path in (task.path, *self.opened.source.files)]
        return sha256(json.dumps([files, str(self.compute.dtype)]).encode()).hexdigest()


# runs a task with its fingerprint; its line of the report
Code = Callable[["CosmosTokenizer", Task, str], str]
# flags of every command
_MACHINE = options(
    LoadOptions, hidden=LoadOptions.model_fields.keys() - {"checkpoint_dir", "device", "dtype"}
)


@click.group()
def tokenize() -> None:
    """Encode clips to latents or token ids, and decode them.

    With the continuous (CV) and the discrete (DV) video tokenizers. A clip of any length is coded
    as a whole, without a seam, in bounded memory.
    """


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@options(EncodeFlags)
@_MACHINE
@click.pass_context
def encode(context: click.Context, /, inputs: Sequence[str], **_: object) -> None:
    """Encode INPUTS, clips and images or folders of them, to .safetensors files.

    Each goes to --output_dir under its own name: "latents" (C, t, h, w), not normalised, of a
    continuous tokenizer, "tokens" (t, h, w) of a discrete one. Sizes that the tokenizer cannot take
    are padded by repeating the last row, column or frame, which `decode` cuts off again.
    """
    from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_kind, probe

    flags = parsed(context, EncodeFlags)

    def examine(path: Path) -> Task:
        info = probe(path)
        header = Header(
            tokenizer=flags.tokenizer_dir,
            media=media_kind(path),
            fps=info.fps or _FPS,
            source=str(path.resolve()),
        )
        return Task(path, Path(flags.output_dir) / f"{path.stem}{_SUFFIX}", header)

    tasks = collect(inputs, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES), examine)
    run(tasks, open_coder(flags.tokenizer_dir, context), encode_task, resume=flags.resume)


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@options(DecodeFlags)
@_MACHINE
@click.pass_context
def decode(context: click.Context, /, inputs: Sequence[str], **_: object) -> None:
    """Decode INPUTS, files that `encode` wrote or folders of them, to videos and images.

    A clip becomes an .mp4 in --output_dir, an image a .png, each of its own size, with a .json
    beside it that names its origin.
    """
    flags = parsed(context, DecodeFlags)
    tasks = collect(inputs, (_SUFFIX,), lambda path: examine_stored(path, Path(flags.output_dir)))
    names = {task.header.tokenizer for task in tasks}
    if flags.tokenizer_dir is None and (len(names) > 1 or "" in names):
        raise InputError(
            f"the inputs name {len(names)} tokenizers ({', '.join(sorted(names))}); give "
            "--tokenizer_dir, or decode them apart"
        )
    coder = open_coder(flags.tokenizer_dir or names.pop(), context)
    from worldline.tokenizers.cosmos.clips import check_stored  # imports torch: not before

    problems = []
    for task in tasks:
        assert task.stored is not None
        try:
            check_stored(coder.opened.config, task.stored, task.header.shape)
        except ValueError as error:
            problems.append(f"{task}: it holds {task.kind}, not of {coder.name}: {error}")
    refuse_problems(problems)
    run(tasks, coder, decode_task, resume=flags.resume)


@tokenize.command()
@options(ReconstructFlags)
@_MACHINE
@click.pass_context
def reconstruct(context: click.Context, /, **_: object) -> None:
    """Encode and decode clips, and report the fidelity in dB."""
    from worldline.video.read import media_kind, probe

    flags = parsed(context, ReconstructFlags)
    if flags.video_pattern is None:
        raise InputError("no input; give --video_pattern, in quotes")
    matches = sorted(glob(flags.video_pattern, recursive=True))
    paths = [name for name in matches if not Path(name).is_dir()]
    if not paths:
        raise InputError(f"--video_pattern {flags.video_pattern} fits no file")

    def examine(path: Path) -> Task:
        info = probe(path)
        folder = Path(flags.output_dir or path.parent / "reconstructions")
        suffix = ".png" if media_kind(path) == "image" else ".mp4"
        header = Header(fps=flags.output_fps or info.fps or _FPS)
        return Task(path, folder / f"{path.stem}{suffix}", header)

    tasks = collect(paths, (), examine)
    halves = [half for half in (flags.checkpoint_enc, flags.checkpoint_dec) if half]
    whole = flags.checkpoint or (
        flags.tokenizer_type and f"Cosmos-Tokenize1-{flags.tokenizer_type}"
    )
    if len(halves) == 1 or bool(halves) == bool(whole):
        raise InputError(
            "give one of --checkpoint, --checkpoint_enc with --checkpoint_dec, --tokenizer_type"
        )
    if flags.mode:
        logger.info("--mode has no effect: files of both kinds are read, and none is executed")
    coder = open_coder(whole or Path(halves[0]).parent.name, context, *map(Path, halves))
    run(tasks, coder, partial(reconstruct_task, flags=flags))


def collect(
    inputs: Iterable[str], suffixes: Sequence[str], examine: Callable[[Path], Task]
) -> list[Task]:
    """Tasks for files, and for the files of folders that have one of `suffixes`.

    Raises:
        InputError: an input cannot be used, two would become one file, or a folder cannot be
            written; one line for each.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    for name in inputs:
        paths = [Path(name)]
        if paths[0].is_dir():
            files = [p for p in sorted(paths[0].iterdir()) if p.is_file() and p.name[0] != "."]
            paths = [path for path in files if path.suffix.lower() in suffixes]
            if len(paths) < len(files):
                logger.info("%s: %d other files are skipped", name, len(files) - len(paths))
            if not paths:
                problems.append(f"{name}: it holds no file with {', '.join(suffixes)}")
        for path in paths:
            try:
                tasks.append(examine(path))
            except (InputError, CheckpointError) as error:
                problems.append(str(error))
    read = {task.path.resolve() for task in tasks}
    first: dict[str, Task] = {}
    for task in tasks:
        # a file system may ignore case
        other = first.setdefault(folded(str(task.output)), task)
        if other is not task:
            problems.append(f"{task} and {other} would both become {other.output}")
        if task.output.resolve() in {*read, Path(task.header.source)}:
            problems.append(f"{task.output}: it is an input; choose another --output_dir")
    refuse_problems(problems)
    for folder in sorted({task.output.parent for task in tasks}):
        check_folder(folder)
    return tasks


def examine_stored(path: Path, folder: Path) -> Task:
    """Task of decoding a file, from its header.

    Raises:
        InputError: it holds no latents and no tokens, or its header is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file or folder")
    from worldline.weights.checkpoint import open_checkpoint  # imports torch: not before

    source = open_checkpoint(path)
    kind = next((name for name in (LATENTS, TOKENS) if name in source.tensors), None)
    if kind is None:
        names = ", ".join(sorted(source.tensors)[:3])
        raise InputError(f"{path}: it holds neither latents nor tokens, but {names}")
    try:
        header = Header.model_validate(source.metadata)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"{path}: {wrong['loc'][0]} is {wrong['input']}; {wrong['msg']}") from None
    suffix = ".png" if header.media == "image" else ".mp4"
    return Task(path, folder / f"{path.stem}{suffix}", header, kind, source.tensors[kind])


def open_coder(name: str, context: click.Context, *files: Path) -> Coder:
    """The tokenizer of a name below --checkpoint_dir, or in `files`."""
    from worldline.locate import locate

    flags = parsed(context, LoadOptions)
    place = None if files else locate(name, flags.checkpoint_dir, tokenizer=True)
    from worldline.opening import choose_compute  # imports torch: not before the place is found
    from worldline.tokenizers.cosmos.weights import open_tokenizer

    opened = open_tokenizer(*(files if place is None else (place.named,)))
    return Coder(name, opened, choose_compute(flags))


def is_finished(task: Task, coder: Coder) -> bool:
    """Whether an earlier run made the output from the same files in the same way."""
    from worldline.video.read import check_written
    from worldline.weights.checkpoint import open_checkpoint

    if not task.output.exists():
        return False
    try:
        if task.output.suffix == _SUFFIX:
            report = open_checkpoint(task.output).metadata
        else:
            check_written(task.output, None)
            report = read_json(task.output.with_suffix(".json"))
        finished = report.get("fingerprint") == coder.fingerprint(task)
    except InputError:
        finished = False
    logger.info("%s %s", task.output, "is finished" if finished else "differs: made again")
    return finished


def run(tasks: Sequence[Task], coder: Coder, code: Code, *, resume: bool = False) -> None:
    """Load the tokenizer, run the tasks that are not finished, and report.

    Raises:
        Error: a task failed; the others of several were done.
    """
    total, folder, failed = len(tasks), tasks[0].output.parent, 0
    if resume:
        tasks = [task for task in tasks if not is_finished(task, coder)]
    if tasks:
        with memory_advice():
            model = coder.opened.read(coder.compute.device, coder.compute.dtype)
        parameters = f"{coder.opened.num_parameters / 1e6:,.1f} M parameters"
        logger.info("%s (%s) on %s", coder.name, parameters, coder.compute.device)

        def one(task: Task, _: str) -> str:
            start = time.perf_counter()
            task.output.parent.mkdir(parents=True, exist_ok=True)
            fingerprint = coder.fingerprint(task)  # a file that changes meanwhile differs
            with memory_advice():
                line = code(model, task, fingerprint)
            return f"{task.output}: {line}, {time.perf_counter() - start:.1f} s"

        failed, _ = run_each(tasks, one, batch=total > 1)
    if total > 1 or not tasks:
        report_done(len(tasks) - failed, total - len(tasks), total, folder, "files")
    if failed:
        raise Error(f"{failed} of {total} inputs failed")


def encode_task(model: CosmosTokenizer, task: Task, fingerprint: str) -> str:
    from worldline.tokenizers.cosmos.clips import encode_clip
    from worldline.video.read import stream_media
    from worldline.weights.checkpoint import save

    stored, size = encode_clip(model, stream_media(task.path, model.chunk * model.config.temporal))
    kind = TOKENS if model.config.levels else LATENTS
    made = {"fingerprint": fingerprint, "worldline": version("worldline")}
    header = {**task.header.model_dump(), **vars(size), **made}
    save({kind: stored}, task.output, header)
    return f"{in_words(size)} in {kind} {' x '.join(map(str, stored.shape))}"


def decode_task(model: CosmosTokenizer, task: Task, fingerprint: str) -> str:
    from worldline.tokenizers.cosmos.clips import decode_clip
    from worldline.video.write import write_bytes
    from worldline.weights.checkpoint import open_checkpoint

    stored = open_checkpoint(task.path).read(task.kind)
    try:
        line = write(decode_clip(model, stored, task.header.shape), task.output, task.header.fps)
    except ValueError as error:
        if isinstance(error, Error):
            raise
        raise InputError(f"{task}: {error}") from error
    report = {"output": str(task.output), "input": str(task), "fingerprint": fingerprint}
    write_bytes(task.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    return line


def reconstruct_task(model: CosmosTokenizer, task: Task, _: str, *, flags: ReconstructFlags) -> str:
    import numpy as np
    import torch

    from worldline.evaluate.metrics import decibels, mse
    from worldline.tokenizers.cosmos.clips import decode_clip, encode_clip, reconstruct_windows
    from worldline.video.convert import scaled
    from worldline.video.read import stream_media

    window = flags.temporal_window

    def source() -> Iterator[Frames]:
        for piece in stream_media(task.path, window or model.chunk * model.config.temporal):
            yield scaled(piece, flags.short_size) if flags.short_size else piece

    pieces: Iterable[Frames]
    if window:
        clips = (torch.from_numpy(piece)[None] for piece in source())
        pieces = (reconstruct_windows(model, clip, window)[0].cpu().numpy() for clip in clips)
    else:
        pieces = decode_clip(model, *encode_clip(model, source()))
    errors: list[float] = []  # mean square of each frame

    def compared() -> Iterator[Frames]:
        originals = chain.from_iterable(source())
        for piece in pieces:
            errors.extend(mse(frame[None], next(originals)[None]) for frame in piece)
            yield piece

    line = write(compared(), task.output, task.header.fps)
    if flags.save_input:
        beside = task.output.with_stem(f"{task.output.stem}_input")
        write(source(), beside, task.header.fps)
    return f"{line}, {decibels(float(np.mean(errors))):.1f} dB"


def write(pieces: Iterable[Frames], output: Path, fps: float) -> str:
    """Write frames as a video, or as an image; their size in words."""
    from PIL import Image

    from worldline.video.read import probe
    from worldline.video.write import write_video, writing

    if output.suffix == ".png":
        [picture] = pieces
        with writing(output) as temporary:
            Image.fromarray(picture[0]).save(temporary, format="PNG")
    else:
        write_video(chain.from_iterable(pieces), output, fps)
    info = probe(output)
    return in_words(VideoShape(info.frames, info.height, info.width))


def in_words(size: VideoShape) -> str:
    plural = "s" if size.frames > 1 else ""
    return f"{size.frames:,} frame{plural} of {size.width} x {size.height}"
