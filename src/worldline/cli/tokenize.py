"""`worldline tokenize`: clips and images to latents or token ids, and back, in pieces."""

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
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from worldline.cli.inputs import list_files
from worldline.cli.options import parameters, parsed
from worldline.cli.run import Run, check_outputs, in_words, refuse_problems, run_tasks
from worldline.errors import InputError
from worldline.files import digest, folded
from worldline.request import BatchFlags, LoadOptions, OutputFlags
from worldline.request import Path as Named
from worldline.shapes import VideoShape

if TYPE_CHECKING:
    from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
    from worldline.video.read import Frames

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_FPS = 24.0  # where neither clip nor header states a rate
_Path = Named | None


class DecodeFlags(BatchFlags, OutputFlags):
    """Arguments and flags of `tokenize decode`."""

    inputs: tuple[Named, ...] = Field(json_schema_extra={"argument": True})
    tokenizer_dir: _Path = Field(
        None,
        description="Tokenizer folder below --checkpoint_dir, a path, or tiny-… for a bundled one."
        "  [default: the one named in the INPUTS]",
    )
    output_dir: Named = Field("outputs", description="Folder of the results; made if absent.")
    resume: bool = Field(False, description="Keep results of an earlier run of equal inputs.")


class EncodeFlags(DecodeFlags):
    """Arguments and flags of `tokenize encode`."""

    tokenizer_dir: Named = Field(
        "Cosmos-Tokenize1-CV8x8x8-720p",
        description="Tokenizer folder below --checkpoint_dir, a path, or tiny-… for a bundled one; "
        "`worldline models` lists them.",
    )


class ReconstructFlags(BatchFlags, OutputFlags):
    """Flags of cosmos-predict1 `tokenizer/inference/video_cli.py`."""

    video_pattern: _Path = Field(None, description="Clips and images, such as 'clips/*.mp4'.")
    checkpoint: _Path = Field(
        None, description="Tokenizer: folder, file of all of it, or tiny-… for a bundled one."
    )
    checkpoint_enc: _Path = Field(None, description="File of its encoder; needs --checkpoint_dec.")
    checkpoint_dec: _Path = Field(None, description="File of its decoder.")
    tokenizer_type: (
        Literal["CV8x8x8-720p", "DV8x16x16-720p", "CV4x8x8-360p", "DV4x8x8-360p"] | None
    ) = Field(None, description="A released one, below --checkpoint_dir.")
    mode: Literal["jit", "torch"] | None = Field(
        None, description="No effect: both are read the same way."
    )
    short_size: int | None = Field(None, ge=2, le=8192, description="Scale the short side to it.")
    temporal_window: int | None = Field(
        None, ge=1, le=100_000, description="Frames coded apart, with seams.  [default: all]"
    )
    output_dir: _Path = Field(
        None, description="Folder of the results.  [default: `reconstructions` beside each input]"
    )
    output_fps: float | None = Field(
        None, ge=0.01, le=1e4, description="Frames per second.  [default: the clip's own]"
    )
    save_input: bool = Field(False, description="Write the encoded frames too: NAME_input.mp4.")


class Header(BaseModel):
    """Metadata beside latents or tokens; sizes are of the clip before padding, 0 if unknown."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    tokenizer: str = ""
    media: Literal["image", "video"] = "video"
    frames: NonNegativeInt = 0
    height: NonNegativeInt = 0
    width: NonNegativeInt = 0
    fps: float = Field(_FPS, ge=0.01, le=1e4)
    source: str = ""  # path of the clip

    @property
    def shape(self) -> VideoShape | None:
        sizes = self.frames, self.height, self.width
        return VideoShape(*sizes) if all(sizes) else None

    @property
    def suffix(self) -> str:
        """Suffix of the decoded clip or image."""
        return ".png" if self.media == "image" else ".mp4"


@dataclass(frozen=True)
class Task:
    """One file to make of a clip, an image, latents or tokens."""

    path: Path
    output: Path
    header: Header  # of the stored input, or for the result

    def __str__(self) -> str:
        return str(self.path)


# runs a task with its fingerprint; its line of the report
Code = Callable[["CosmosTokenizer", Task, str], str]
# flags of every command
_MACHINE = parameters(
    LoadOptions, hidden=LoadOptions.model_fields.keys() - {"checkpoint_dir", "device", "dtype"}
)


@click.group()
def tokenize() -> None:
    """Encode clips to latents or token ids, and decode them.

    With the continuous (CV) and the discrete (DV) video tokenizers. A clip of any length is coded
    as a whole, without a seam, in bounded memory.
    """


@tokenize.command(params=[*parameters(EncodeFlags), *_MACHINE])
@click.pass_context
def encode(context: click.Context, /, **_: object) -> None:
    """Encode INPUTS, clips and images or folders of them, to .safetensors files.

    Each goes to --output_dir under its own name: "latents" (C, t, h, w), not normalised, of a
    continuous tokenizer, "tokens" (t, h, w) of a discrete one. Sizes that the tokenizer cannot take
    are padded by repeating the last row, column or frame, which `decode` cuts off again.
    """
    flags = parsed(context, EncodeFlags)
    folder, name = Path(flags.output_dir), flags.tokenizer_dir
    examine = partial(examine_media, folder=folder, tokenizer=name, suffix=_SUFFIX)
    tasks = collect(flags.inputs, examine)
    run(context, tasks, [name], encode_task, flags)


@tokenize.command(params=[*parameters(DecodeFlags), *_MACHINE])
@click.pass_context
def decode(context: click.Context, /, **_: object) -> None:
    """Decode INPUTS, files that `encode` wrote or folders of them, to videos and images.

    A clip becomes an .mp4 in --output_dir, an image a .png, each of its own size, with a .json
    beside it that names its origin.
    """
    flags = parsed(context, DecodeFlags)
    examine = partial(examine_stored, folder=Path(flags.output_dir))
    tasks = collect(flags.inputs, examine, (_SUFFIX,))
    names = {task.header.tokenizer for task in tasks}
    if flags.tokenizer_dir is None and (len(names) > 1 or "" in names):
        known = ", ".join(sorted(names))
        raise InputError(f"the inputs name {len(names)} tokenizers ({known}); give --tokenizer_dir")
    run(context, tasks, [flags.tokenizer_dir or names.pop()], decode_task, flags)


@tokenize.command(params=[*parameters(ReconstructFlags), *_MACHINE])
@click.pass_context
def reconstruct(context: click.Context, /, **_: object) -> None:
    """Encode and decode clips, and report the fidelity in dB."""
    flags = parsed(context, ReconstructFlags)
    if flags.video_pattern is None:
        raise InputError("no input; give --video_pattern, in quotes")
    paths = [p for p in sorted(glob(flags.video_pattern, recursive=True)) if not Path(p).is_dir()]
    if not paths:
        raise InputError(f"--video_pattern {flags.video_pattern} fits no file")
    folder = Path(flags.output_dir) if flags.output_dir else None
    tasks = collect(paths, partial(examine_media, folder=folder))
    halves = [half for half in (flags.checkpoint_enc, flags.checkpoint_dec) if half]
    released = flags.tokenizer_type and f"Cosmos-Tokenize1-{flags.tokenizer_type}"
    whole = flags.checkpoint or released
    if len(halves) == 1 or bool(halves) == bool(whole):
        raise InputError(
            "give one of --checkpoint, --checkpoint_enc with --checkpoint_dec, --tokenizer_type"
        )
    code = partial(reconstruct_task, flags=flags)
    run(context, tasks, [whole] if whole else halves, code, flags)


def collect(
    inputs: Iterable[str], examine: Callable[[Path], Task], suffixes: Sequence[str] = ()
) -> list[Task]:
    """Tasks for files, and for those in folders that have one of `suffixes`, or are media."""
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for name in inputs:
        path = Path(name)
        paths = list_files(path, suffixes) if path.is_dir() else [path]
        if not paths:
            problems.append(f"{name}: it holds no file with {', '.join(suffixes) or 'media'}")
        for path in paths:
            try:
                task = examine(path)
            except InputError as error:
                problems.append(str(error))
                continue
            # a file system may ignore case
            other = tasks.setdefault(folded(str(task.output)), task)
            if other is not task:
                problems.append(f"{task} and {other} would both become {other.output}")
    refuse_problems(problems)
    paths = [path for task in tasks.values() for path in (task.path, Path(task.header.source))]
    check_outputs([task.output for task in tasks.values()], paths)
    return [*tasks.values()]


def examine_media(
    path: Path, folder: Path | None, tokenizer: str = "", suffix: str | None = None
) -> Task:
    """Task of coding a clip or an image; its result goes to `folder`, or beside it."""
    from worldline.video.read import probe

    info, source = probe(path), str(path.resolve())
    if info.notes:
        logger.info("%s: %s", path, "; ".join(info.notes))
    header = Header(tokenizer=tokenizer, media=info.kind, fps=info.fps or _FPS, source=source)
    output = (folder or path.parent / "reconstructions") / f"{path.stem}{suffix or header.suffix}"
    return Task(path, output, header)


def examine_stored(path: Path, folder: Path) -> Task:
    """Task of decoding a file, from its header."""
    from worldline.weights.checkpoint import open_checkpoint  # imports torch: not before

    try:
        header = Header.model_validate(open_checkpoint(path).metadata)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"{path}: {wrong['loc'][0]} is {wrong['input']}; {wrong['msg']}") from None
    return Task(path, folder / f"{path.stem}{header.suffix}", header)


def run(
    context: click.Context,
    tasks: Sequence[Task],
    tokenizer: Sequence[str],
    code: Code,
    flags: OutputFlags,
) -> None:
    """Load a tokenizer, of one name or of the files of its halves, and run tasks."""
    from worldline.locate import locate

    options = parsed(context, LoadOptions)
    files = [locate(each, options.checkpoint_dir, tokenizer=True).named for each in tokenizer]
    from worldline.opening import choose_compute  # imports torch: not before the place is found
    from worldline.tokenizers.cosmos.weights import open_tokenizer

    opened = open_tokenizer(*files)
    if code is decode_task:
        check_stored(opened.config, tasks)
    fleet = context.meta.get("fleet")
    compute = (fleet.choose_compute if fleet else choose_compute)(options)

    def fingerprint(task: Task) -> str:
        files = [digest(path, sampled=True) for path in opened.source.files]
        facts = [digest(task.path), files, repr(opened.config), str(compute.dtype)]
        return sha256(json.dumps(facts).encode()).hexdigest()

    def load(_: object) -> Run:
        model = opened.read(compute.device, compute.dtype)
        size = opened.num_parameters / 1e6
        logger.info(f"{opened.path} ({size:,.1f} M parameters) on {compute.device}")

        def one(task: Task, *_: object) -> str:
            start = time.perf_counter()
            task.output.parent.mkdir(parents=True, exist_ok=True)
            # beforehand: a file that changes meanwhile differs
            line = code(model, task, fingerprint(task))
            return f"{task.output}: {line}, {time.perf_counter() - start:.1f} s"

        return one, 1

    runner = fleet.run_tasks if fleet else run_tasks
    runner(tasks, load, fingerprint, flags, "files", mesh=compute.mesh)


def check_stored(config: CosmosTokenizerConfig, tasks: Iterable[Task]) -> None:
    """Refuse latents and tokens that are not of a tokenizer."""
    from worldline.tokenizers.cosmos import clips
    from worldline.weights.checkpoint import open_checkpoint

    problems, kind = [], kind_of(config)
    for task in tasks:
        tensors = open_checkpoint(task.path).tensors
        try:
            if kind not in tensors:
                raise ValueError(f"it holds {', '.join(tensors)}, the tokenizer decodes {kind}")
            clips.check_stored(config, tensors[kind], task.header.shape)
        except ValueError as error:
            problems.append(f"{task}: {error}")
    refuse_problems(problems)


def kind_of(config: CosmosTokenizerConfig) -> str:
    """Name of the tensor in a file."""
    return "tokens" if config.levels else "latents"


def encode_task(model: CosmosTokenizer, task: Task, fingerprint: str) -> str:
    from worldline.tokenizers.cosmos.clips import encode_clip
    from worldline.video.read import stream_media
    from worldline.weights.checkpoint import content_digest, save

    stored, size = encode_clip(model, stream_media(task.path, model.chunk * model.config.temporal))
    kind = kind_of(model.config)
    made = {"fingerprint": fingerprint, "worldline": version("worldline")}
    header = {**task.header.model_dump(), **vars(size), **made}
    save({kind: stored}, task.output, {**header, "digest": content_digest({kind: stored}, header)})
    return f"{in_words(size)} in {kind} {' x '.join(map(str, stored.shape))}"


def decode_task(model: CosmosTokenizer, task: Task, fingerprint: str) -> str:
    from worldline.tokenizers.cosmos.clips import decode_clip
    from worldline.video.write import write_bytes
    from worldline.weights.checkpoint import open_checkpoint

    stored = open_checkpoint(task.path).read(kind_of(model.config))
    try:
        pieces = decode_clip(model, stored, task.header.shape)
    except ValueError as error:
        raise InputError(f"{task}: {error}") from error
    line = write(pieces, task.output, task.header.fps)
    report = {
        "output": str(task.output),
        "input": str(task),
        "fingerprint": fingerprint,
        "file_sha256": digest(task.output),
    }
    write_bytes(task.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    return line


def reconstruct_task(model: CosmosTokenizer, task: Task, _: str, *, flags: ReconstructFlags) -> str:
    import torch

    from worldline.evaluate.metrics import decibels, mse
    from worldline.tokenizers.cosmos.clips import decode_clip, encode_clip, reconstruct_windows
    from worldline.video.convert import scaled
    from worldline.video.read import MAX_IMAGE, check_pixels, probe, stream_media

    window, fps = flags.temporal_window, flags.output_fps or task.header.fps
    info = probe(task.path)
    check_pixels(task.path, min(window or 1, info.frames), info.height, info.width, MAX_IMAGE)

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

    line = write(compared(), task.output, fps)
    if flags.save_input:
        write(source(), task.output.with_stem(f"{task.output.stem}_input"), fps)
    return f"{line}, {decibels(fmean(errors)):.1f} dB"


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
    return in_words(probe(output))
