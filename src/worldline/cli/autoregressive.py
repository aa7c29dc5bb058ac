"""`worldline autoregressive base`: continue clips and images, one or many.

Flags, names and defaults are those of cosmos-predict1 `autoregressive/inference/base.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from worldline.errors import Error, GuardrailRefusal, InputError

if TYPE_CHECKING:
    from worldline.cli.inputs import Item
    from worldline.loading import AutoregressiveFiles
    from worldline.pipelines.autoregressive import AutoregressiveRequest
    from worldline.world import Step, Video, World

logger = logging.getLogger(__name__)

# names of formats that are not written; another ending after a dot is part of the name
_UNWRITTEN = (".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".3gp")
_STAGES = {"encode": "encoding", "tokens": "drawing {total:,} tokens", "decode": "decoding"}


@click.group()
def autoregressive() -> None:
    """Run the autoregressive models.

    These are 4B and 12B, of Cosmos 1.0 and of Predict1.
    """


@autoregressive.command()
@click.option(
    "--checkpoint_dir", default="checkpoints", show_default=True, help="Holds the model folders."
)
@click.option(
    "--ar_model_dir",
    default="Cosmos-Predict1-4B",
    show_default=True,
    help="Folder of the model below --checkpoint_dir, a path, or tiny-… for a bundled one.",
)
@click.option(
    "--input_type", type=click.Choice(["image", "video"]), default="video", show_default=True
)
@click.option("--input_image_or_video_path", help="One input: mp4, mov, mkv, webm, gif, png, jpg…")
@click.option(
    "--batch_input_path",
    help="Many inputs: a JSONL with a visual_input a line, or a folder of media.",
)
@click.option("--input_prompts_path", help="Another name of --batch_input_path.")
@click.option(
    "--num_input_frames",
    type=click.Choice(["1", "9"]),
    default="9",
    callback=lambda context, parameter, value: int(value),
    show_default=True,
    help="How many of the input's last frames are continued; an image has 1.",
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top_p",
    type=float,
    default=0.8,
    show_default=True,
    help="Draw among the likeliest tokens with this mass; made for 4B, use 0.9 for 12B.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws of each clip.")
@click.option(
    "--video_save_name",
    default="output",
    show_default=True,
    help="Of a single video, without .mp4; .mov .mkv .webm .gif choose another format.",
)
@click.option("--video_save_folder", default="outputs/", show_default=True)
@click.option(
    "--resume", is_flag=True, help="Keep videos that an earlier run made in the same way."
)
@click.option("--disable_diffusion_decoder", is_flag=True, help="Decode by the tokenizer alone.")
@click.option("--disable_guardrail", is_flag=True, help="Do not check the video.")
@click.option("--offload_ar_model", is_flag=True, help="Keep it in host memory while unused.")
@click.option("--offload_tokenizer", is_flag=True, help="Keep it in host memory while unused.")
@click.option("--offload_diffusion_decoder", is_flag=True, help="Accepted; there is none yet.")
@click.option("--offload_guardrail_models", is_flag=True, help="Accepted; there are none yet.")
@click.option("--offload_prompt_upsampler", is_flag=True, help="Accepted; base models have none.")
@click.option("--num_gpus", type=int, default=1, show_default=True, help="1 in this version.")
@click.option("--device", help="cuda, cuda:1, cpu, mps…; by default the GPU, if there is one.")
@click.pass_context
def base(context: click.Context, /, **flags: Any) -> None:
    """Continue videos or images by 24 or 32 frames, without a prompt.

    A single video is written to --video_save_folder/--video_save_name.mp4, those of a batch to
    0.mp4, 1.mp4, … by the 0-based line of the JSONL; a JSON report is written beside each.
    """
    given = {
        name for name in flags if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    _refuse_several_gpus(flags["num_gpus"])
    inputs = _choose_input(flags)
    _refuse_missing_parts(flags)
    items = _read_inputs(inputs, flags)
    request = _make_request(flags)
    _log_notes(flags, given, batch=inputs.batch)
    tasks = _choose_outputs(items, inputs, flags)
    files = _find_files(flags, request)
    if flags["resume"]:
        tasks = _leave_out_finished(tasks, files, request)
        if not tasks:
            click.echo(f"nothing left to do in {flags['video_save_folder']}")
            return
    _run(tasks, files, request, flags, batch=inputs.batch)


@dataclass(frozen=True)
class Inputs:
    """Where the inputs are named."""

    path: str
    batch: bool


@dataclass(frozen=True)
class Task:
    """One input and the video that it becomes."""

    item: Item
    output: Path


def _refuse_several_gpus(num_gpus: int) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if num_gpus != 1:
        raise InputError(f"--num_gpus is {num_gpus}; this version runs on 1 GPU: give --num_gpus 1")
    if processes != "1":
        raise InputError(
            f"started as {processes} processes (WORLD_SIZE); this version runs on 1 GPU: "
            "start it without torchrun"
        )


def _choose_input(flags: dict[str, Any]) -> Inputs:
    names = ("input_image_or_video_path", "batch_input_path", "input_prompts_path")
    named = [name for name in names if flags[name] is not None]
    if not named:
        raise InputError("no input: give --input_image_or_video_path or --batch_input_path")
    if len(named) > 1:
        raise InputError(f"--{' and --'.join(named)} exclude each other: give one")
    path = flags[named[0]]
    if not path:
        raise InputError(f"--{named[0]} is empty")
    return Inputs(path, batch=named[0] != "input_image_or_video_path")


def _refuse_missing_parts(flags: dict[str, Any]) -> None:
    from worldline.catalog import check_parts, is_bundled

    check_parts(
        is_bundled(flags["ar_model_dir"]),
        flags["disable_diffusion_decoder"] or None,
        flags["disable_guardrail"] or None,
    )


def _read_inputs(inputs: Inputs, flags: dict[str, Any]) -> list[Item]:
    from worldline.cli.inputs import read_batch, read_single

    kind = flags["input_type"]
    frames = 1 if kind == "image" else flags["num_input_frames"]
    if inputs.batch:
        return read_batch(inputs.path, kind, frames)
    return [read_single(inputs.path, kind, frames)]


def _make_request(flags: dict[str, Any]) -> AutoregressiveRequest:
    from worldline.pipelines.autoregressive import AutoregressiveRequest

    return AutoregressiveRequest(
        num_input_frames=1 if flags["input_type"] == "image" else flags["num_input_frames"],
        temperature=flags["temperature"],
        top_p=flags["top_p"],
        seed=flags["seed"],
    )


def _log_notes(flags: dict[str, Any], given: set[str], *, batch: bool) -> None:
    """Say what was asked for and has no effect, and what to expect of the model."""
    from worldline.catalog import find, is_bundled

    if is_bundled(flags["ar_model_dir"]):
        logger.info(
            "%s knows generated clips of moving shapes alone; of others it makes coloured fog",
            flags["ar_model_dir"],
        )
    absent = (
        ("offload_guardrail_models", "no guardrail runs"),
        ("offload_diffusion_decoder", "no diffusion decoder runs"),
        ("offload_prompt_upsampler", "base models take no prompt, so none is upsampled"),
    )
    for name, reason in absent:
        if flags[name]:
            logger.info("--%s has no effect: %s", name, reason)
    if flags["temperature"] == 0:
        for name in ("top_p", "seed"):
            if name in given:
                logger.info("--%s has no effect: temperature 0 draws nothing at random", name)
    if batch and "video_save_name" in given:
        logger.info("--video_save_name has no effect: videos of a batch are numbered")
    if is_bundled(flags["ar_model_dir"]) and "checkpoint_dir" in given:
        logger.info("--checkpoint_dir has no effect: %s is bundled", flags["ar_model_dir"])
    image = flags["input_type"] == "image"
    if image and "num_input_frames" in given and flags["num_input_frames"] != 1:
        logger.info("--num_input_frames has no effect: an image has 1 frame")
    entry = find(Path(flags["ar_model_dir"]).name)
    if entry and entry.failure_rates and (image or flags["num_input_frames"] == 1):
        one, nine = entry.failure_rates
        if one >= 5:
            logger.warning(
                "from 1 frame about %d %% of the videos of %s fail, from 9 frames %d %% "
                "(published figures)",
                one,
                entry.name,
                nine,
            )


def _choose_outputs(items: Sequence[Item], inputs: Inputs, flags: dict[str, Any]) -> list[Task]:
    """Name the videos, and make sure that they can be written and overwrite no input.

    Raises:
        InputError: the folder cannot be written, a name is none, or an input is in the way.
    """
    from worldline.video.read import IMAGE_SUFFIXES
    from worldline.video.write import ENCODINGS, check_destination

    folder = Path(flags["video_save_folder"])
    name = flags["video_save_name"]
    if not inputs.batch and not Path(name).name:
        raise InputError(f"--video_save_name {name!r} is no name")
    suffix = Path(name).suffix.lower()
    if not inputs.batch and suffix in (*_UNWRITTEN, *IMAGE_SUFFIXES):
        raise InputError(
            f"--video_save_name {name}: cannot write {suffix}; use {' '.join(ENCODINGS)}, "
            "or a name without suffix for .mp4"
        )
    if inputs.batch:
        outputs = [folder / f"{item.number}.mp4" for item in items]
    elif suffix in ENCODINGS:
        outputs = [folder / name]
    else:
        outputs = [folder / f"{name}.mp4"]
    for output in outputs:
        check_destination(output)
    check_folder(outputs[0].parent, "--video_save_folder")
    read = {item.path.resolve() for item in items}
    for output in outputs:
        if output.resolve() in read:
            raise InputError(
                f"{output} is an input; choose another --video_save_folder"
                + ("" if inputs.batch else " or --video_save_name")
            )
    return [Task(item, output) for item, output in zip(items, outputs, strict=True)]


def check_folder(folder: Path, flag: str) -> None:
    """Try whether the folder that `flag` names can be written, or made; leaves nothing behind.

    Raises:
        InputError: that does not work.
    """
    nearest = folder.absolute()
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{flag} {folder} cannot be written: {reason}") from error


def _leave_out_finished(
    tasks: list[Task], files: AutoregressiveFiles, request: AutoregressiveRequest
) -> list[Task]:
    """Return the tasks whose video is not there yet, or was made from other files or otherwise."""
    from worldline.files import stamp

    identity = files.identity()
    left = []
    for task in tasks:
        if not task.output.exists():
            left.append(task)
            continue
        try:
            report = json.loads(task.output.with_suffix(".json").read_text())
            same = (
                report["files"] == {**identity, "input": stamp(task.item.path)}
                and report["request"] == request.__dict__
            )
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if same:
            logger.info("%s is finished", task.output)
        else:
            logger.info("%s was made in another way, or not finished: made again", task.output)
            left.append(task)
    return left


def _find_files(flags: dict[str, Any], request: AutoregressiveRequest) -> AutoregressiveFiles:
    """Find and check the model, and that it has something to make for this request."""
    from worldline.loading import find_autoregressive
    from worldline.pipelines.autoregressive import check_room

    files = find_autoregressive(flags["ar_model_dir"], flags["checkpoint_dir"])
    check_room(files.config, files.tokenizer_config, request.num_input_frames)
    return files


@contextmanager
def _memory_advice(flags: dict[str, Any]) -> Iterator[None]:
    """Turn an exhausted device into an error that names the flags which help."""
    from worldline.cli import is_out_of_memory
    from worldline.loading import OFFLOAD_FLAGS

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        detail = str(error).splitlines()[0].rstrip(".") if str(error) else "no memory left"
        on_host = isinstance(error, MemoryError)  # where offloading would need more, not less
        left = [f"--{name}" for name in OFFLOAD_FLAGS if not flags[name] and not on_host]
        lower = "lowers" if len(left) == 1 else "lower"
        advice = f"; {' and '.join(left)} {lower} the need" if left else ""
        raise Error(f"out of memory: {detail}{advice}") from error


def _run(
    tasks: Sequence[Task],
    files: AutoregressiveFiles,
    request: AutoregressiveRequest,
    flags: dict[str, Any],
    *,
    batch: bool,
) -> None:
    """Load the world, make the videos one after another, and say what came of it.

    Raises:
        Error: an item failed; the others of the batch were made.
        GuardrailRefusal: none failed, but one was refused.
    """
    from worldline.loading import OFFLOAD_FLAGS
    from worldline.world import load_files

    with _memory_advice(flags):
        world = load_files(
            files,
            device=flags["device"],
            offload_ar_model=flags["offload_ar_model"],
            offload_tokenizer=flags["offload_tokenizer"],
        )
    if world.device.type == "cpu":
        for name in OFFLOAD_FLAGS:
            if flags[name]:
                logger.info("--%s has no effect: the model runs on the CPU", name)
    logger.info("%s", describe_world(world))
    failed, refused = 0, 0
    for position, task in enumerate(tasks):
        label = f"{position + 1}/{len(tasks)} {task.item.path}" if batch else str(task.item.path)
        try:
            with _memory_advice(flags):
                options = {"input_type": flags["input_type"], **vars(request)}
                video = follow(world.stream(task.item.path, **options), label)
            video.save(task.output)
        except Exception as error:
            if not batch or _is_disk_full(error):
                raise
            refused += isinstance(error, GuardrailRefusal)
            failed += not isinstance(error, GuardrailRefusal)
            logger.error("%s: %s", label, _one_line(error))
            logger.debug("%s", traceback.format_exc())
        else:
            click.echo(describe_video(video, task.output))
    made = len(tasks) - failed - refused
    if batch:
        click.echo(f"{made} of {len(tasks)} videos are in {tasks[0].output.parent}")
    if failed:
        raise Error(f"{failed} of {len(tasks)} inputs failed; --resume tries them alone")
    if refused:
        raise GuardrailRefusal(f"{refused} of {len(tasks)} videos were refused", stage="video")


def _is_disk_full(error: BaseException) -> bool:
    """Tell whether going on would waste the time of every further clip."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, Error) else f"{type(error).__name__}: {first}"


def describe_world(world: World) -> str:
    """Return one line about what was loaded."""
    loading = world.loading.as_dict()
    shape = world.parts.video
    return (
        f"{world.name} ({world.parameters / 1e6:,.1f} M parameters) on {world.device}: "
        f"{shape.frames} frames of {shape.width} x {shape.height}; "
        f"loaded in {loading['seconds']:.1f} s, {loading['peak_gb']:.2f} GB"
    )


def describe_video(video: Video, path: Path) -> str:
    """Return where a video is, and what it took."""
    report = video.report
    run = report["run"]
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in run["stages"])
    return (
        f"{path}: {len(video.frames)} frames, seed {report['request']['seed']}, "
        f"{run['seconds']:.1f} s ({stages}), {report['tokens_per_second']} tokens/s, "
        f"peak memory {run['peak_gb']:.2f} GB; worldline {report['worldline']}, "
        f"torch {report['torch']}, {report['attention']}"
    )


def follow(steps: Iterator[Step], label: str) -> Video:
    """Run a request to its end; show a bar on a terminal, else a line a stage."""
    from tqdm import tqdm

    told = ""
    on_terminal = sys.stderr.isatty()
    bar: Any = None
    try:
        for step in steps:
            if step.video is not None:
                return step.video
            if step.kind != told:
                told = step.kind
                stage = _STAGES[told].format(total=step.total)
                if not on_terminal:
                    logger.info("%s: %s", label, stage)
                elif told == "tokens":
                    bar = tqdm(total=step.total, desc=label, unit="token", leave=False)
            if bar is not None and step.kind == "tokens":
                bar.update(step.done - bar.n)
    finally:
        if bar is not None:
            bar.close()
    raise AssertionError("a stream ends with its video")
