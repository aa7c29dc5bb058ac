"""`worldline tokenize encode|decode`: clips and images to latents or token ids, and back.

A clip of any length is coded as one, piece by piece, so that there is no seam and no limit.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.batch import run_each, tell_all, tell_nothing_left
from worldline.cli.run import DEVICE_HELP, check_folder, memory_advice, refuse_empty
from worldline.errors import Error, InputError
from worldline.files import folded
from worldline.shapes import VideoShape

if TYPE_CHECKING:
    import torch

    from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
    from worldline.video.read import Frames
    from worldline.weights.read import Checkpoint

logger = logging.getLogger(__name__)

LATENTS, TOKENS = "latents", "tokens"  # the tensor in a file
_DTYPES = {  # of it
    LATENTS: ("bfloat16", "float16", "float32", "float64"),
    TOKENS: ("uint8", "int16", "int32", "int64"),
}
_SUFFIX = ".safetensors"
_FPS = 24.0  # of a clip that does not say
_SIZE = ("frames", "height", "width")
_TYPES = ("CV8x8x8-720p", "DV8x16x16-720p", "CV4x8x8-360p", "DV4x8x8-360p")
_OF_DTYPE = "Of the computation; by default bfloat16 on a GPU, else float32."

Command = Callable[..., None]


@dataclass(frozen=True)
class Task:
    """One file to make.

    Attributes:
        path: the clip or image to encode, or the file to decode.
        output: what it becomes.
        told: to decode, the text in the file's header.
        grid: to decode, the shape of its tensor, and under which name.
    """

    path: Path
    output: Path
    told: Mapping[str, str] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    kind: str = ""

    @property
    def shape(self) -> VideoShape | None:
        """The size of the clip before it was padded; None where the header has none."""
        if not all(name in self.told for name in _SIZE):
            return None
        return VideoShape(*(int(self.told[name]) for name in _SIZE))


@dataclass(frozen=True)
class Coder:
    """A tokenizer that is found and not loaded.

    Attributes:
        name: as it was asked for.
        folder: where it lies.
        source: its tensors.
        config: what they imply.
        device: where it is to run.
        dtype: in which it is to compute.
    """

    name: str
    folder: Path
    source: Checkpoint
    config: CosmosTokenizerConfig
    device: torch.device
    dtype: torch.dtype

    def load(self) -> CosmosTokenizer:
        from worldline.tokenizers.cosmos.load import build_tokenizer

        return build_tokenizer(self.source, self.config, device=self.device, dtype=self.dtype)

    def made_from(self, task: Task) -> dict[str, Any]:
        """Return all that decides what a task gives."""
        from worldline.files import stamp

        return {
            "input": stamp(task.path),
            "tokenizer": [stamp(path) for path in self.source.files],
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@click.group()
def tokenize() -> None:
    """Encode clips to latents or token ids, and decode them.

    With the continuous (CV) and the discrete (DV) video tokenizers. A clip of any length is coded
    as a whole, without a seam, in bounded memory.
    """


def _options(tokenizer: str | None, text: str) -> Callable[[Command], Command]:
    options = (
        click.option("--tokenizer_dir", default=tokenizer, show_default=True, help=text),
        click.option(
            "--checkpoint_dir",
            default="checkpoints",
            show_default=True,
            help="Holds the folders of models.",
        ),
        click.option(
            "--output_dir",
            default="outputs",
            show_default=True,
            help="Where the files go; made if it is not there.",
        ),
        click.option("--device", help=DEVICE_HELP),
        click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help=_OF_DTYPE),
        click.option(
            "--resume", is_flag=True, help="Keep what an earlier run made in the same way."
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@_options(
    "Cosmos-Tokenize1-CV8x8x8-720p",
    "Folder of the tokenizer below --checkpoint_dir, a path, or tiny-… for a bundled one; "
    "`worldline models` lists them.",
)
def encode(inputs: Sequence[str], **flags: Any) -> None:
    """Encode INPUTS, clips and images or folders of them, to .safetensors files.

    Each goes to --output_dir under its own name: "latents" (C, t, h, w), not normalised, of a
    continuous tokenizer, "tokens" (t, h, w) of a discrete one. What the tokenizer cannot take is
    padded by repeating the last row, column or frame, which `decode` cuts off again.
    """
    from worldline.video.read import IMAGE_SUFFIXES, VIDEO_SUFFIXES, probe

    def examine(path: Path) -> Task:
        probe(path)
        return Task(path, Path(flags["output_dir"]) / f"{path.stem}{_SUFFIX}")

    refuse_empty(flags, ("tokenizer_dir",))
    tasks = _collect(inputs, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES), examine, flags)
    coder = _find(flags["tokenizer_dir"], flags)
    _run(tasks, coder, _encode, flags, _read_header)


@tokenize.command()
@click.argument("inputs", nargs=-1, required=True)
@_options(
    None,
    "Folder below --checkpoint_dir, a path, or tiny-… for a bundled one.  [default: the one that "
    "the INPUTS name]",
)
def decode(inputs: Sequence[str], **flags: Any) -> None:
    """Decode INPUTS, files that `encode` wrote or folders of them, to videos and images.

    A clip becomes an .mp4 in --output_dir, an image a .png, each of its own size, with a .json
    beside it that says what it was made from.
    """
    refuse_empty(flags, ("tokenizer_dir",))
    tasks = _collect(inputs, (_SUFFIX,), lambda path: _examine_coded(path, flags), flags)
    coder = _find(_tokenizer_of(tasks, flags), flags)
    _refuse([text for task in tasks if (text := _misfit(task, coder))], len(tasks))
    _run(tasks, coder, _decode, flags, _read_report)


@tokenize.command()
@click.option("--video_pattern", help="The clips and images, such as 'clips/*.mp4'.")
@click.option(
    "--checkpoint",
    help="The tokenizer: its folder, a file that holds all of it, or tiny-… for a bundled one.",
)
@click.option("--checkpoint_enc", help="File of its encoder; needs --checkpoint_dec.")
@click.option("--checkpoint_dec", help="File of its decoder.")
@click.option(
    "--tokenizer_type",
    type=click.Choice(_TYPES),
    metavar=f"[{'|'.join(_TYPES)}]",  # click would show them with _
    help="A released one, below --checkpoint_dir.",
)
@click.option(
    "--checkpoint_dir", default="checkpoints", show_default=True, help="Holds released folders."
)
@click.option(
    "--mode", type=click.Choice(["jit", "torch"]), help="Has no effect: both are read alike."
)
@click.option(
    "--short_size", type=click.IntRange(2, 8192), help="Scale so that the short side is this long."
)
@click.option(
    "--temporal_window",
    type=click.IntRange(1, 100_000),
    help="Code so many frames apart from all others, with seams; by default the whole clip as one.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help=_OF_DTYPE)
@click.option("--device", help=DEVICE_HELP)
@click.option(
    "--output_dir", help="By default the folder `reconstructions` beside each of the inputs."
)
@click.option("--output_fps", type=click.FloatRange(0.01, 1e4), help="By default the clip's own.")
@click.option("--save_input", is_flag=True, help="Write what was encoded, too: NAME_input.mp4.")
def reconstruct(**flags: Any) -> None:
    """Encode and decode clips, to see what a tokenizer keeps of them, in dB.

    Flags are those of cosmos-predict1 `tokenizer/inference/video_cli.py`.
    """
    from worldline.video.read import probe

    if not flags["video_pattern"]:
        raise InputError("no input: give --video_pattern, in quotes")
    found = sorted(glob(flags["video_pattern"], recursive=True))
    paths = [name for name in found if not Path(name).is_dir()]
    if not paths:
        raise InputError(f"--video_pattern {flags['video_pattern']} fits no file")

    def examine(path: Path) -> Task:
        info = probe(path)
        folder = Path(flags["output_dir"] or path.parent / "reconstructions")
        suffix = ".png" if info.kind == "image" else ".mp4"
        fps = flags["output_fps"] or info.fps or _FPS
        return Task(path, folder / f"{path.stem}{suffix}", {"fps": str(fps)})

    tasks = _collect(paths, (), examine, flags)
    coder = _coder_of(flags)
    if flags["mode"]:
        logger.info("--mode has no effect: files of both kinds are read, and none is executed")

    def run(model: CosmosTokenizer, coder: Coder, task: Task) -> str:
        return _reconstruct(model, task, flags)

    _run(tasks, coder, run, flags)


def _coder_of(flags: dict[str, Any]) -> Coder:
    """Return the tokenizer that the flags of the released script name."""
    halves = [flags["checkpoint_enc"], flags["checkpoint_dec"]]
    given = [flags["checkpoint"], any(halves), flags["tokenizer_type"]]
    if sum(map(bool, given[:2])) > 1 or not any(given):
        raise InputError(
            "give one of --checkpoint, --checkpoint_enc with --checkpoint_dec, --tokenizer_type"
        )
    if not any(halves):
        return _find(flags["checkpoint"] or f"Cosmos-Tokenize1-{flags['tokenizer_type']}", flags)
    if not all(halves):
        raise InputError("--checkpoint_enc and --checkpoint_dec are needed both")
    from worldline.tokenizers.cosmos.load import open_files

    folder = Path(halves[0]).parent
    source, config = open_files([Path(half) for half in halves], folder.name)
    return Coder(folder.name, folder, source, config, *_place(flags))


def _reconstruct(model: CosmosTokenizer, task: Task, flags: dict[str, Any]) -> str:
    import math

    import torch

    from worldline.tokenizers.cosmos.clips import decode_clip, encode_clip
    from worldline.tokenizers.cosmos.stream import CHUNK
    from worldline.tokenizers.cosmos.windows import reconstruct_windows
    from worldline.video.convert import scaled
    from worldline.video.read import stream_media

    window = flags["temporal_window"]

    def source() -> Iterator[Frames]:
        for piece in stream_media(task.path, window or CHUNK * model.config.temporal):
            yield scaled(piece, flags["short_size"]) if flags["short_size"] else piece

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
    if flags["save_input"]:
        output = task.output.with_stem(f"{task.output.stem}_input")
        _write(source(), replace(task, output=output))
    psnr = 10 * math.log10(255**2 * count / error) if error else math.inf
    return f"{_measured(size)}, {psnr:.1f} dB"


def _collect(
    inputs: Sequence[str],
    suffixes: Sequence[str],
    examine: Callable[[Path], Task],
    flags: dict[str, Any],
) -> list[Task]:
    """Return a task for each input, or all that is wrong with them.

    Raises:
        InputError: an input cannot be used, two would become one file, or the folder is unusable.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    count = 0
    for name in inputs:
        paths = [Path(name)]
        if paths[0].is_dir():
            paths = _files_in(paths[0], suffixes)
            if not paths:
                problems.append(f"{name} holds nothing to {click.get_current_context().info_name}")
        count += max(1, len(paths))
        for path in paths:
            if not path.exists():
                problems.append(f"{path}: no such file")
                continue
            try:
                tasks.append(examine(path))
            except InputError as error:
                problems.append(str(error))
    read = {task.path.resolve() for task in tasks}
    outputs: defaultdict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        outputs[folded(str(task.output))].append(task)
    for task in tasks:
        others = [other for other in outputs[folded(str(task.output))] if other is not task]
        if any(other.output == task.output for other in others):
            problems.append(f"{task.path}: another input would become {task.output}, too")
        elif others:
            problems.append(
                f"{task.path}: {others[0].path} would become {others[0].output}, which is "
                f"{task.output} where case is ignored"
            )
        elif task.output.resolve() in read:
            problems.append(f"{task.output} is an input; choose another --output_dir")
    _refuse(problems, count)
    for folder in sorted({task.output.parent for task in tasks}):
        check_folder(folder, "--output_dir")
    return tasks


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files of a folder by name; those of other kinds are told and passed over."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    other = [path.name for path in found if path.suffix.lower() not in suffixes]
    if other:
        logger.info("%s: passed over: %s", folder, ", ".join(other))
    return [path for path in found if path.suffix.lower() in suffixes]


def _refuse(problems: Sequence[str], count: int) -> None:
    if len(problems) == 1 == count:
        raise InputError(problems[0])
    if problems:
        told = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(f"{len(problems)} of {count} inputs cannot be used, so none was run{told}")


def _examine_coded(path: Path, flags: dict[str, Any]) -> Task:
    """Look at the header of a file that is to be decoded.

    Raises:
        InputError: it is none of ours, or its video would overwrite the clip it was made from.
    """
    from worldline.weights.read import open_checkpoint

    source = open_checkpoint(path)
    kind = next((name for name in (LATENTS, TOKENS) if name in source.tensors), None)
    if kind is None:
        held = ", ".join(sorted(source.tensors)[:3])
        raise InputError(f"{path} holds neither latents nor tokens, but {held}")
    info = source.tensors[kind]
    if len(info.shape) != (4 if kind == LATENTS else 3) or not info.numel:
        raise InputError(f"{path}: {kind} of shape {list(info.shape)}")
    stored = str(info.dtype).removeprefix("torch.")
    if stored not in _DTYPES[kind]:
        wanted = ", ".join(_DTYPES[kind])
        raise InputError(f"{path}: {kind} are {stored}; they must be one of {wanted}")
    told = source.metadata
    suffix = ".png" if told.get("media") == "image" else ".mp4"
    output = Path(flags["output_dir"]) / f"{path.stem}{suffix}"
    task = Task(path, output, told, info.shape, kind)
    try:
        size, fps = task.shape, float(told.get("fps", _FPS))
        made_from = json.loads(told.get("made_from", "{}"))
        original = Path(made_from.get("input", {}).get("path", ""))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: its header is damaged: {error}") from error
    sides = (1, 1, 1) if size is None else (size.frames, size.height, size.width)
    if min(sides) < 1 or not 0.01 <= fps <= 1e4:
        raise InputError(f"{path}: its header is damaged: {size}, {fps} frames a second")
    if output.resolve() == original.resolve():
        raise InputError(f"{output} is the clip it was made from; choose another --output_dir")
    return task


def _find(name: str, flags: dict[str, Any]) -> Coder:
    from worldline.locate import locate

    folder = locate(name, flags["checkpoint_dir"], tokenizer=True).named  # before torch is imported
    from worldline.tokenizers.cosmos.load import open_tokenizer

    return Coder(name, folder, *open_tokenizer(folder), *_place(flags))


def _place(flags: dict[str, Any]) -> tuple[torch.device, torch.dtype]:
    import torch

    from worldline.loading import choose_device, compute_dtype

    device = choose_device(flags["device"])
    return device, getattr(torch, flags["dtype"]) if flags["dtype"] else compute_dtype(device)


def _tokenizer_of(tasks: Sequence[Task], flags: dict[str, Any]) -> str:
    """Return the name of the tokenizer that all inputs were made with, unless one is given."""
    if flags["tokenizer_dir"] is not None:
        return str(flags["tokenizer_dir"])
    names = {task.told.get("tokenizer", "") for task in tasks}
    if len(names) > 1:
        told = ", ".join(sorted(name or "an unknown one" for name in names))
        raise InputError(f"the inputs were made with {told}: decode those of each apart")
    name = names.pop()
    if not name:
        raise InputError("the inputs do not say what made them: give --tokenizer_dir")
    return name


def _misfit(task: Task, coder: Coder) -> str:
    """Say why a file is not of this tokenizer; "" if it may be."""
    config = coder.config
    wanted = LATENTS if config.levels is None else TOKENS
    if task.kind != wanted:
        return f"{task.path} holds {task.kind}, but {coder.folder} decodes {wanted}"
    if wanted == LATENTS and task.grid[0] != config.latent_channels:
        return (
            f"{task.path} has latents of {task.grid[0]} channels, "
            f"but those of {coder.folder} have {config.latent_channels}"
        )
    size = task.shape
    if size is None:
        return ""
    padded = VideoShape(
        size.frames + -(size.frames - 1) % config.temporal,
        size.height + -size.height % config.spatial,
        size.width + -size.width % config.spatial,
    )
    grid = padded.latent(config.temporal, config.spatial)
    if (grid.frames, grid.height, grid.width) != task.grid[-3:]:
        return (
            f"{task.path}: {size.frames} frames of {size.width} x {size.height} in "
            f"{' x '.join(map(str, task.grid[-3:]))} cells are not of {coder.folder}"
        )
    return ""


def _leave_out_finished(
    tasks: Sequence[Task], coder: Coder, read: Callable[[Path], Mapping[str, Any]]
) -> list[Task]:
    """Return the tasks whose file is not there, or was made from other files or otherwise."""
    left = []
    for task in tasks:
        if not task.output.exists():
            left.append(task)
            continue
        try:
            same = read(task.output) == coder.made_from(task)
        except (OSError, ValueError, KeyError):
            same = False
        if same:
            logger.info("%s is finished", task.output)
        else:
            logger.info("%s was made in another way, or not finished: made again", task.output)
            left.append(task)
    return left


def _read_header(path: Path) -> Any:
    from worldline.weights.read import open_checkpoint

    return json.loads(open_checkpoint(path).metadata["made_from"])


def _read_report(path: Path) -> Any:
    from worldline.video.read import check_written

    check_written(path, None)
    return json.loads(path.with_suffix(".json").read_text())["made_from"]


def _run(
    tasks: Sequence[Task],
    coder: Coder,
    run: Callable[[CosmosTokenizer, Coder, Task], str],
    flags: dict[str, Any],
    read: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Load the tokenizer, do the tasks one after another, and say what came of it.

    Args:
        tasks: all that were asked for.
        coder: the tokenizer.
        run: does a task, and returns what to say of it.
        flags: of the command.
        read: returns what a file was made from; None for a command that leaves nothing out.

    Raises:
        Error: a task failed; the others of several were done.
    """
    total = len(tasks)
    if read is not None and flags["resume"]:
        tasks = _leave_out_finished(tasks, coder, read)
    if not tasks:
        tell_nothing_left(total, Path(flags["output_dir"]), "files")
        return
    for folder in {task.output.parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    with memory_advice(flags, ()):
        model = coder.load()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(coder.dtype).removeprefix("torch.")
    logger.info(
        "%s (%s M parameters, %s) on %s",
        coder.name,
        f"{parameters / 1e6:,.1f}",
        dtype,
        coder.device,
    )

    def do(task: Task, _: str) -> str:
        begun = time.perf_counter()
        with memory_advice(flags, ()):
            told = run(model, coder, task)
        return f"{task.output}: {told}, {time.perf_counter() - begun:.1f} s"

    failed, _ = run_each(tasks, do, lambda task: task.path, batch=total > 1)
    if read is not None and total > 1:
        before = total - len(tasks)
        tell_all(len(tasks) - failed, before, total, Path(flags["output_dir"]), "files")
    if failed:
        advice = "" if read is None else "; --resume tries them alone"
        raise Error(f"{failed} of {total} inputs failed{advice}")


def _encode(model: CosmosTokenizer, coder: Coder, task: Task) -> str:
    from importlib.metadata import version

    from worldline.tokenizers.cosmos.clips import encode_clip
    from worldline.tokenizers.cosmos.stream import CHUNK
    from worldline.video.read import media_kind, probe, stream_media
    from worldline.weights.write import save

    made_from = coder.made_from(task)  # before it is read: a file that changes meanwhile differs
    media = media_kind(task.path)
    fps = probe(task.path, kind=media).fps
    pieces = stream_media(task.path, CHUNK * model.config.temporal)
    stored, size = encode_clip(model, pieces)
    kind = LATENTS if model.config.levels is None else TOKENS
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
    cells = " x ".join(map(str, stored.shape))
    return f"{_measured(size)} in {kind} {cells}"


def _decode(model: CosmosTokenizer, coder: Coder, task: Task) -> str:
    from worldline.tokenizers.cosmos.clips import decode_clip
    from worldline.video.write import write_bytes
    from worldline.weights.read import open_checkpoint

    made_from = coder.made_from(task)
    stored = open_checkpoint(task.path).read(task.kind)
    try:
        pieces = decode_clip(model, stored, task.shape)
        size = _write(pieces, task)
    except ValueError as error:
        if isinstance(error, Error):
            raise
        raise InputError(f"{task.path}: {error}") from error
    report = {"output": str(task.output), "input": str(task.path), "made_from": made_from}
    write_bytes(task.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    return _measured(size)


def _write(pieces: Iterable[Frames], task: Task) -> VideoShape:
    """Write frames as a video, or as an image, and return their size."""
    import io

    from PIL import Image

    from worldline.video.write import write_bytes, write_stream

    height = width = 0

    def measured() -> Iterator[Frames]:
        nonlocal height, width
        for piece in pieces:
            height, width = piece.shape[1:3]
            yield piece

    if task.output.suffix == ".png":
        [picture] = measured()
        file = io.BytesIO()
        Image.fromarray(picture[0]).save(file, format="PNG")
        write_bytes(task.output, file.getbuffer())
        return VideoShape(1, height, width)
    frames = write_stream(measured(), task.output, float(task.told.get("fps", _FPS)))
    return VideoShape(frames, height, width)


def _measured(size: VideoShape) -> str:
    frames = f"{size.frames:,} frame{'s' if size.frames > 1 else ''}"
    return f"{frames} of {size.width} x {size.height}"
