"""`worldline tokenize`: clips and images to latents or token ids, and back.

A clip of any length is coded as one, piece by piece, so that there is no seam and no limit.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import Field

from worldline.cli.batch import check_folder, memory_advice, report_done, run_each
from worldline.cli.options import options, parsed
from worldline.errors import Error, InputError
from worldline.files import folded
from worldline.request import Options
from worldline.request import Path as Named
from worldline.shapes import VideoShape

if TYPE_CHECKING:
    import torch

    from worldline.tokenizers.cosmos.model import CosmosTokenizer
    from worldline.tokenizers.cosmos.weights import CosmosNetwork
    from worldline.video.read import Frames
    from worldline.weights.source import TensorInfo

logger = logging.getLogger(__name__)

LATENTS, TOKENS = "latents", "tokens"  # names of the tensor in a file
_SUFFIX = ".safetensors"
_FPS = 24.0  # where neither clip nor header states a rate


class Machine(Options):
    """Flags of all commands."""

    checkpoint_dir: Named = Field("checkpoints", description="Folder of the model folders.")
    device: str | None = Field(
        None, description="cuda, cuda:1, cpu, mps.  [default: the GPU, if there is one]"
    )
    dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="Precision.  [default: bfloat16 on a GPU, else float32]"
    )


class DecodeFlags(Machine):
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


class ReconstructFlags(Machine):
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


@dataclass(frozen=True)
class Task:
    """One file to make.

    Attributes:
        path: input: a clip, an image, or a file of latents or tokens.
        output: result.
        kind: name of the tensor in the input; "" for pixels.
        stored: dtype and shape of that tensor.
        header: metadata beside it; of pixels the frame rate alone.
    """

    path: Path
    output: Path
    kind: str = ""
    stored: TensorInfo | None = None
    header: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def shape(self) -> VideoShape | None:
        """Size of the clip before it was padded; None if the header lacks it."""
        names = ("frames", "height", "width")
        if not all(name in self.header for name in names):
            return None
        return VideoShape(*(int(self.header[name]) for name in names))

    @property
    def fps(self) -> float:
        return float(self.header.get("fps", _FPS))


@dataclass(frozen=True)
class Coder:
    """A tokenizer, not loaded yet, and how it will run."""

    name: str
    opened: CosmosNetwork
    device: torch.device
    dtype: torch.dtype

    def made_from(self, task: Task) -> dict[str, Any]:
        """Fingerprint of all that decides a result; --resume compares it."""
        from worldline.files import stamp

        return {
            "input": stamp(task.path),
            "tokenizer": [stamp(path) for path in self.opened.source.files],
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@click.group()
def tokenize() -> None:
    """Encode clips to latents or token ids, and decode them.

    With the continuous (CV) and the discrete (DV) video tokenizers. A clip of any length is coded
    as a whole, without a seam, in bounded memory.
    """


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@options(EncodeFlags)
@click.pass_context
def encode(context: click.Context, /, inputs: Sequence[str], **_: object) -> None:
    """Encode INPUTS, clips and images or folders of them, to .safetensors files.

    Each goes to --output_dir under its own name: "latents" (C, t, h, w), not normalised, of a
    continuous tokenizer, "tokens" (t, h, w) of a discrete one. Sizes that the tokenizer cannot take
    are padded by repeating the last row, column or frame, which `decode` cuts off again.
    """
    from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, probe

    flags = parsed(context, EncodeFlags)

    def examine(path: Path) -> Task:
        probe(path)
        return Task(path, Path(flags.output_dir) / f"{path.stem}{_SUFFIX}")

    tasks = _collect(inputs, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES), examine)
    _run(tasks, _find(flags.tokenizer_dir, flags), _encode, resume=flags.resume)


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@options(DecodeFlags)
@click.pass_context
def decode(context: click.Context, /, inputs: Sequence[str], **_: object) -> None:
    """Decode INPUTS, files that `encode` wrote or folders of them, to videos and images.

    A clip becomes an .mp4 in --output_dir, an image a .png, each of its own size, with a .json
    beside it that names its origin.
    """
    flags = parsed(context, DecodeFlags)
    folder = Path(flags.output_dir)
    tasks = _collect(inputs, (_SUFFIX,), lambda path: _examine_stored(path, folder))
    name = flags.tokenizer_dir
    if name is None:
        names = sorted({task.header.get("tokenizer", "") for task in tasks})
        if len(names) > 1 or not names[0]:
            raise InputError(
                f"the inputs name {len(names)} tokenizers ({', '.join(names)}); "
                "give --tokenizer_dir, or decode them apart"
            )
        name = names[0]
    coder = _find(name, flags)
    _refuse([text for task in tasks if (text := _misfit(task, coder))], len(tasks))
    _run(tasks, coder, _decode, resume=flags.resume)


@tokenize.command()
@options(ReconstructFlags)
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
        info = probe(path, kind=media_kind(path))
        folder = Path(flags.output_dir or path.parent / "reconstructions")
        suffix = ".png" if info.kind == "image" else ".mp4"
        header = {"fps": str(flags.output_fps or info.fps or _FPS)}
        return Task(path, folder / f"{path.stem}{suffix}", header=header)

    tasks = _collect(paths, (), examine)
    halves = [half for half in (flags.checkpoint_enc, flags.checkpoint_dec) if half]
    whole = flags.checkpoint or (
        flags.tokenizer_type and f"Cosmos-Tokenize1-{flags.tokenizer_type}"
    )
    if len(halves) == 1 or bool(halves) == bool(whole) or (halves and flags.checkpoint):
        raise InputError(
            "give one of --checkpoint, --checkpoint_enc with --checkpoint_dec, --tokenizer_type"
        )
    name = whole or Path(halves[0]).parent.name
    if flags.mode:
        logger.info("--mode has no effect: files of both kinds are read, and none is executed")
    _run(tasks, _find(name, flags, *map(Path, halves)), partial(_reconstruct, flags=flags))


def _collect(
    inputs: Sequence[str], suffixes: Sequence[str], examine: Callable[[Path], Task]
) -> list[Task]:
    """Tasks for files, and for the files of folders that have one of `suffixes`.

    Raises:
        InputError: an input cannot be used, two would become one file, or the folder is unusable;
            all that is wrong with them.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    count = 0
    for name in inputs:
        paths = [Path(name)]
        if paths[0].is_dir():
            files = [p for p in sorted(paths[0].iterdir()) if p.is_file() and p.name[0] != "."]
            paths = [path for path in files if path.suffix.lower() in suffixes]
            if unused := [path.name for path in files if path not in paths]:
                logger.info("%s: passed over: %s", name, ", ".join(unused))
            if not paths:
                problems.append(f"{name} holds no file with {', '.join(suffixes)}")
        count += max(1, len(paths))
        for path in paths:
            try:
                if not path.exists():
                    raise InputError(f"{path}: no such file")
                tasks.append(examine(path))
            except InputError as error:
                problems.append(str(error))
    read = {task.path.resolve() for task in tasks}
    first: dict[str, Task] = {}
    for task in tasks:
        # a file system may ignore case
        other = first.setdefault(folded(str(task.output)), task)
        if other is not task:
            problems.append(f"{task.path} and {other.path} would both become {other.output}")
        if task.output.resolve() in read:
            problems.append(f"{task.output} is an input; choose another --output_dir")
    _refuse(problems, count)
    for folder in sorted({task.output.parent for task in tasks}):
        check_folder(folder)
    return tasks


def _refuse(problems: Sequence[str], count: int) -> None:
    if len(problems) == 1 == count:
        raise InputError(problems[0])
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(
            f"{len(problems)} of {count} inputs cannot be used, so none was run{lines}"
        )


def _examine_stored(path: Path, folder: Path) -> Task:
    """Task of decoding a file, from its header.

    Raises:
        InputError: it holds something else, or its video would overwrite the clip it came from.
    """
    from worldline.weights.read import open_checkpoint

    source = open_checkpoint(path)
    kind = next((name for name in (LATENTS, TOKENS) if name in source.tensors), None)
    if kind is None:
        names = ", ".join(sorted(source.tensors)[:3])
        raise InputError(f"{path} holds neither latents nor tokens, but {names}")
    header = source.metadata
    output = folder / f"{path.stem}{'.png' if header.get('media') == 'image' else '.mp4'}"
    task = Task(path, output, kind, source.tensors[kind], header)
    try:
        size, fps = task.shape or VideoShape(1, 1, 1), task.fps
        original = json.loads(header.get("made_from", "{}")).get("input", {}).get("path", "")
        if min(size.frames, size.height, size.width) < 1 or not 0.01 <= fps <= 1e4:
            raise ValueError(f"{size}, {fps} frames a second")
        overwritten = output.resolve() == Path(original).resolve()
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: its header is damaged: {error}") from error
    if overwritten:
        raise InputError(f"{output} is the clip it was made from; choose another --output_dir")
    return task


def _misfit(task: Task, coder: Coder) -> str:
    """Message that a file is not of this tokenizer; "" if it may be."""
    from worldline.tokenizers.cosmos.clips import check_stored

    assert task.stored is not None
    try:
        check_stored(coder.opened.config, task.stored.dtype, task.stored.shape, task.shape)
    except ValueError as error:
        return f"{task.path} holds {task.kind} of another tokenizer than {coder.name}: {error}"
    return ""


def _find(name: str, flags: Machine, *files: Path) -> Coder:
    """The tokenizer of a name below --checkpoint_dir, or in `files`."""
    from worldline.locate import locate

    paths = files or (
        locate(name, flags.checkpoint_dir, tokenizer=True).named,
    )  # before torch is imported
    from worldline.opening import choose_compute
    from worldline.request import LoadOptions
    from worldline.tokenizers.cosmos.weights import open_tokenizer

    compute = choose_compute(LoadOptions.parse({"device": flags.device, "dtype": flags.dtype}))
    return Coder(name, open_tokenizer(*paths), compute.device, compute.dtype)


def _is_finished(task: Task, coder: Coder) -> bool:
    """Whether an earlier run made the output from the same files in the same way."""
    from worldline.video.read import check_written
    from worldline.weights.read import open_checkpoint

    if not task.output.exists():
        return False
    try:
        if task.output.suffix == _SUFFIX:
            made_from = json.loads(open_checkpoint(task.output).metadata["made_from"])
        else:
            check_written(task.output, None)
            made_from = json.loads(task.output.with_suffix(".json").read_text())["made_from"]
        finished = bool(made_from == coder.made_from(task))
    except (OSError, ValueError, KeyError):
        finished = False
    logger.info("%s %s", task.output, "is finished" if finished else "differs: made again")
    return finished


def _run(
    tasks: Sequence[Task],
    coder: Coder,
    code: Callable[[CosmosTokenizer, Coder, Task], str],
    *,
    resume: bool = False,
) -> None:
    """Load the tokenizer, run the tasks one after another, and report.

    Args:
        tasks: all tasks; with `resume`, finished ones are left out.
        coder: the tokenizer.
        code: runs a task, and returns its line of the report.
        resume: keep finished results.

    Raises:
        Error: a task failed; the others of several were done.
    """
    total, folder = len(tasks), tasks[0].output.parent
    if resume:
        tasks = [task for task in tasks if not _is_finished(task, coder)]
    for output in {task.output.parent for task in tasks}:
        output.mkdir(parents=True, exist_ok=True)
    failed = 0
    if tasks:
        with memory_advice():
            model = coder.opened.read(coder.device, coder.dtype)
        logger.info(
            "%s (%s M parameters, %s) on %s",
            coder.name,
            f"{coder.opened.num_parameters / 1e6:,.1f}",
            str(coder.dtype).removeprefix("torch."),
            coder.device,
        )

        def one(task: Task, _: str) -> str:
            start = time.perf_counter()
            with memory_advice():
                line = code(model, coder, task)
            return f"{task.output}: {line}, {time.perf_counter() - start:.1f} s"

        failed, _ = run_each(tasks, one, batch=total > 1)
    if total > 1 or not tasks:
        report_done(len(tasks) - failed, total - len(tasks), total, folder, "files")
    if failed:
        raise Error(f"{failed} of {total} inputs failed")


def _encode(model: CosmosTokenizer, coder: Coder, task: Task) -> str:
    from importlib.metadata import version

    from worldline.tokenizers.cosmos.clips import encode_clip
    from worldline.video.read import media_kind, probe, stream_media
    from worldline.weights.write import save

    made_from = coder.made_from(task)  # before it is read: a file that changes meanwhile differs
    media = media_kind(task.path)
    fps = probe(task.path, kind=media).fps
    stored, size = encode_clip(model, stream_media(task.path, model.chunk * model.config.temporal))
    kind = TOKENS if model.config.levels else LATENTS
    header = {
        "worldline": version("worldline"),
        "tokenizer": coder.name,
        "media": media,
        "frames": size.frames,
        "height": size.height,
        "width": size.width,
        "fps": fps or _FPS,
        "made_from": json.dumps(made_from),
    }
    save({kind: stored}, task.output, header)
    grid = " x ".join(map(str, stored.shape))
    return f"{_measured(size)} in {kind} {grid}"


def _decode(model: CosmosTokenizer, coder: Coder, task: Task) -> str:
    from worldline.tokenizers.cosmos.clips import decode_clip
    from worldline.video.write import write_bytes
    from worldline.weights.read import open_checkpoint

    made_from = coder.made_from(task)
    stored = open_checkpoint(task.path).read(task.kind)
    try:
        size = _write(decode_clip(model, stored, task.shape), task)
    except ValueError as error:
        if isinstance(error, Error):
            raise
        raise InputError(f"{task.path}: {error}") from error
    report = {"output": str(task.output), "input": str(task.path), "made_from": made_from}
    write_bytes(task.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    return _measured(size)


def _reconstruct(model: CosmosTokenizer, _: Coder, task: Task, flags: ReconstructFlags) -> str:
    import torch

    from worldline.tokenizers.cosmos.clips import decode_clip, encode_clip, reconstruct_windows
    from worldline.video.convert import scaled
    from worldline.video.read import stream_media

    window = flags.temporal_window

    def source() -> Iterator[Frames]:
        for piece in stream_media(task.path, window or model.chunk * model.config.temporal):
            yield scaled(piece, flags.short_size) if flags.short_size else piece

    pieces: Iterable[Frames]
    if window:
        pieces = (
            reconstruct_windows(model, torch.from_numpy(piece)[None], window)[0].cpu().numpy()
            for piece in source()
        )
    else:
        pieces = decode_clip(model, *encode_clip(model, source()))
    error, count = 0.0, 0

    def compared() -> Iterator[Frames]:
        nonlocal error, count
        originals = (frame for piece in source() for frame in piece)
        for piece in pieces:
            for frame, original in zip(piece, originals, strict=False):
                error += float(((frame.astype("f4") - original.astype("f4")) ** 2).sum())
            count += piece.size
            yield piece

    size = _write(compared(), task)
    if flags.save_input:
        output = task.output.with_stem(f"{task.output.stem}_input")
        _write(source(), replace(task, output=output))
    psnr = 10 * math.log10(255**2 * count / error) if error else math.inf
    return f"{_measured(size)}, {psnr:.1f} dB"


def _write(pieces: Iterable[Frames], task: Task) -> VideoShape:
    """Write frames as a video, or as an image, and return their size."""
    import io

    from PIL import Image

    from worldline.video.write import write_bytes, write_stream

    if task.output.suffix == ".png":
        [picture] = pieces
        file = io.BytesIO()
        Image.fromarray(picture[0]).save(file, format="PNG")
        write_bytes(task.output, file.getbuffer())
        return VideoShape(*picture.shape[:3])
    height = width = 0

    def measured() -> Iterator[Frames]:
        nonlocal height, width
        for piece in pieces:
            height, width = piece.shape[1:3]
            yield piece

    frames = write_stream(measured(), task.output, task.fps)
    return VideoShape(frames, height, width)


def _measured(size: VideoShape) -> str:
    frames = f"{size.frames:,} frame{'s' if size.frames > 1 else ''}"
    return f"{frames} of {size.width} x {size.height}"
