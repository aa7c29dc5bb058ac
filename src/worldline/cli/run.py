"""Shared runner of the generating commands: choose outputs, skip finished videos, run, report."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.batch import (
    check_folder,
    free_memory,
    is_disk_full,
    memory_advice,
    one_line,
    report_done,
    run_each,
)
from worldline.cli.failures import is_out_of_memory
from worldline.cli.options import fields_of, parsed, stated
from worldline.cli.progress import Preview, Progress, follow, preview_path
from worldline.errors import (
    Error,
    GuardrailRefusal,
    InputError,
    InsufficientMemoryError,
    joined_stages,
)
from worldline.family import Command, Item, requests_of
from worldline.request import flag

if TYPE_CHECKING:
    from worldline.family import Compute, Opened
    from worldline.step import Video
    from worldline.world import World

logger = logging.getLogger(__name__)

_GIF_FPS = 100  # a GIF's delays are whole hundredths of a second


@dataclass(frozen=True)
class Task:
    """One video to make.

    Attributes:
        item: as it was asked for.
        request: checked.
    """

    item: Item
    request: Any

    def __str__(self) -> str:
        return self.item.label


def run(family: str, command: Command, context: click.Context, reader: Any = None) -> None:
    """Make the videos that a command line asks for.

    Args:
        family: name of the command's family.
        command: what it is.
        context: of click.
        reader: of inputs; by default the command's own.

    Raises:
        InputError: something is wrong; all problems are named, and nothing was made.
        Error: a video failed; the others were made.
        GuardrailRefusal: none failed, but some were refused.
    """
    described, reader = requests_of(family), reader or load_reader(command.reads)
    request_flags = stated(context, fields_of(described.REQUEST))
    option_flags = stated(context, fields_of(described.OPTIONS))
    flags = parsed(context, reader.flags)
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(
            f"WORLD_SIZE is {processes}; this version runs on 1 GPU: start it without torchrun"
        )
    options = described.OPTIONS.parse(option_flags, flag)
    items, problems = reader.read(flags, request_flags)
    requests = check_each(items, problems, lambda item: first_look(item, described.REQUEST))
    check_outputs(items)
    refuse_problems(problems)

    named = stated(context, [command.model])
    model, model_options = named.get(command.model, command.default_model), {}
    if not model:
        raise InputError(f"--{command.model}: it is empty")
    if hasattr(reader, "model"):
        model, model_options = reader.model(flags, model, named)
    opened = open_model(family, model, {**option_flags, **model_options}, options)
    requests = check_each(items, problems, lambda item: final_request(item, opened))
    refuse_problems(problems)
    tasks = [Task(item, request) for item, request in zip(items, requests, strict=True)]
    from worldline.opening import choose_compute

    compute = choose_compute(opened.options)
    log_unused(opened, compute, tasks, stated(context, context.params))
    keep_going = getattr(flags, "keep_going", True)
    make(opened, compute, tasks, resume=flags.resume, keep_going=keep_going)


def load_reader(place: str) -> Any:
    """The reader that a command names."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def check_each(
    items: Sequence[Item], problems: list[str], check: Callable[[Item], Any]
) -> list[Any]:
    """The result of each item; what is wrong with one is added to `problems`."""
    found = []
    for item in items:
        try:
            found.append(check(item))
        except InputError as error:
            for line in str(error).splitlines():
                for field, name in item.names.items():
                    line = re.sub(rf"(?<![\w-]){field} is", f"{name} is", line)
                named = not item.place or item.place in line or line.startswith("--")
                problems.append(line if named else f"{item.place}: {line}")
    return found


def refuse_problems(problems: Sequence[str]) -> None:
    """Raise `InputError` with all problems, each once."""
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def first_look(item: Item, request: Any) -> Any:
    """The request as far as no model is needed for it; its input is there and long enough."""
    from worldline.video.read import probe

    made = request.make(item.stated, {}, item.kind, item.field)
    if item.input is not None and item.kind is not None:
        frames = probe(item.input).frames
        if frames < made.num_input_frames:
            raise InputError(
                f"{item.input}: it has {frames} frames, num_input_frames is "
                f"{made.num_input_frames}; give a longer clip or fewer"
            )
    if item.output.suffix.lower() == ".gif" and made.fps > _GIF_FPS:
        raise InputError(f"fps is {made.fps:g}, a GIF has at most {_GIF_FPS}; use another format")
    return made


def final_request(item: Item, opened: Opened) -> Any:
    """The request with the model's defaults, checked against its files."""
    request = opened.family.request.make(item.stated, opened.defaults, item.kind, item.field)
    return opened.family.check(opened, request)


def open_model(family: str, model: str, stated_options: Mapping[str, Any], options: Any) -> Opened:
    """The model that a command names, of the command's family.

    Raises:
        CheckpointError: a file is absent, incomplete, damaged or of another model.
    """
    from worldline.locate import locate

    place = locate(model, options.checkpoint_dir)
    from worldline.opening import open_world  # imports torch: not before the place is found

    return open_world(place, stated_options, flag, family)


def check_outputs(items: Sequence[Item]) -> None:
    """Make sure that outputs can be written, and that they overwrite no input.

    Raises:
        InputError: they cannot, or they would.
    """
    from worldline.video.write import check_destination

    read: set[Path] = set()
    for item in items:
        embeddings = (
            item.stated.get(f"{kind}_embeddings") for kind in ("prompt", "negative_prompt")
        )
        paths = (item.input, *item.sources, *embeddings)
        read |= {Path(path).resolve() for path in paths if path is not None}
        check_destination(item.output)
    for folder in dict.fromkeys(item.output.parent for item in items):
        check_folder(folder)
    for item in items:
        beside = [item.output.with_suffix(suffix) for suffix in (".json", ".txt")]
        for path in (item.output, *beside, preview_path(item.output)):
            if path.is_dir():
                raise InputError(f"{path}: it is a folder; choose another output")
            if path.resolve() in read:
                raise InputError(f"{path}: it is an input; choose another output")


def log_unused(
    opened: Opened, compute: Compute, tasks: Sequence[Task], typed: Mapping[str, Any]
) -> None:
    """Log flags that were typed and have no effect, and what to expect of a bundled model."""
    from worldline.guards import release_of, upsamples

    request = tasks[0].request
    unused = opened.family.unused(opened, request)
    if compute.device.type == "cpu":
        offload = (name for name in typed if name.startswith("offload_"))
        unused = dict.fromkeys(offload, "the model runs on the CPU") | unused
    if release_of(opened) is None:
        guards = ("offload_guardrail_models", "guardrail_dir")
        unused |= dict.fromkeys(guards, "no guardrail runs")
        if opened.place.bundled:
            disable = opened.options.field_flag("disable_guardrail")
            unused[disable] = f"{opened.name} has no guardrails"
    else:
        unused["preview_every"] = "no frame leaves before the guardrails have checked the video"
    if not upsamples(opened):
        flags = ("offload_prompt_upsampler", "prompt_upsampler_dir", "word_limit_to_skip_upsampler")
        unused |= dict.fromkeys(flags, "no prompt upsampler runs")
    if len(tasks) == 1:
        unused["batch_size"] = "there is one input"
    if typed.get("num_input_frames", request.num_input_frames) != request.num_input_frames:
        unused["num_input_frames"] = "an image has 1 frame"
    if opened.place.bundled:
        unused["checkpoint_dir"] = f"{opened.name} is bundled"
        logger.info(
            "%s was trained on generated clips of moving shapes: other inputs become coloured fog",
            opened.name,
        )
    for name, value in typed.items():
        if name in unused and value is not False:
            logger.info("--%s has no effect: %s", name, unused[name])


def make(
    opened: Opened, compute: Compute, tasks: Sequence[Task], *, resume: bool, keep_going: bool
) -> None:
    """Load a model and make the videos that are not finished.

    Raises:
        Error: a video failed; the others were made.
        GuardrailRefusal: none failed, but some were refused.
    """
    from worldline.guards import release_of, rewrites

    total, folder = len(tasks), tasks[0].item.output.parent
    if resume:
        tasks = [task for task in tasks if not is_finished(task, opened, compute)]
        if not tasks:
            click.echo(f"{total} of {total} videos were in {folder} before")
            return
    if opened.place.bundled and compute.device.type == "cpu":
        import torch

        torch.set_num_threads(1)  # tiny networks: on busy cores threads wait for each other
    upsample = any(rewrites(opened, task.request) for task in tasks)
    parts = [part.flag for part in opened.family.parts if part.name in opened.parts]
    around = {
        "offload_prompt_upsampler": upsample,
        "offload_guardrail_models": release_of(opened) is not None,
    }
    flags = [*dict.fromkeys(parts), *(name for name, runs in around.items() if runs)]
    flags = [name for name in flags if name not in opened.options.offloaded]
    with memory_advice(flags):
        world, size = load(opened, tasks, compute, upsample=upsample)
    logger.info("%s", describe_world(world))
    groups = Groups(tasks, size, world)

    def one(task: Task, label: str) -> str:
        if size > 1 and (line := groups.take(task)) is not None:
            return line
        # a frame of a preview stands for all that a latent frame holds
        tokenizer = opened.get("tokenizer")
        rate = task.request.fps / (tokenizer.config.temporal if tokenizer else 1)
        preview = Preview(task.item.output, rate)
        try:
            with memory_advice(flags):
                job = world.prepare(
                    task.item.input, {}, input_type=task.item.kind, request=task.request
                )
                video = follow(world.run(job), label, preview)
            save(video, task)
        finally:
            preview.remove()
        return describe_video(video, task.item.output)

    batch = total > 1 and keep_going
    failed, refused = run_each(tasks, one, batch=batch)
    made, before = len(tasks) - failed - refused.total(), total - len(tasks)
    if total > 1:
        report_done(made, before, total, folder)
    if failed:
        raise Error(f"{failed} of {total} inputs failed; --resume tries them again")
    if refused:
        counts = ", ".join(f"{count} by the {stage}" for stage, count in sorted(refused.items()))
        message = f"{refused.total()} of {total} inputs were refused: {counts}"
        raise GuardrailRefusal(message, joined_stages(refused))


def load(
    opened: Opened, tasks: Sequence[Task], compute: Compute, *, upsample: bool
) -> tuple[World, int]:
    """The loaded world, and how many clips it computes in step."""
    from dataclasses import replace

    from worldline.guards import release_of
    from worldline.memory import device_memory, refuse_frames
    from worldline.opening import plan
    from worldline.world import load_world

    requests = [task.request for task in tasks]
    chosen = getattr(opened.options, "batch_size", 1)
    most = opened.family.max_batch_size(opened, compute)
    if chosen != "auto":
        size = min(len(tasks), chosen)
        if most is not None and size > most:
            logger.info("--batch_size %d: %d are computed in step, the most possible", chosen, most)
            size = most
    else:
        size = min(len(tasks), most or 1)
        memory = device_memory(compute.device)
        while size > 1 and memory is not None:
            needed = plan(opened, requests, replace(compute, batch_size=size))
            if needed.peak(opened.options.offloaded) <= memory.free:
                break
            size -= 1
    compute = replace(compute, batch_size=size)
    beside = plan(opened, requests, compute).peak() if compute.device.type == "cpu" else 0
    guarded = release_of(opened) is not None
    problems = []
    for task in tasks:
        try:
            video = opened.family.video(opened, task.request)
            clips = size if opened.family.holds_batch(opened, task.request) else 1
            refuse_frames(video, clips=clips, guarded=guarded, beside=beside)
        except InsufficientMemoryError as error:
            problems.append(f"{task.item.place}: {error}" if task.item.place else str(error))
    if problems:
        raise InsufficientMemoryError("\n".join(problems))
    return load_world(opened, requests, compute, upsample=upsample), size


def is_finished(task: Task, opened: Opened, compute: Compute) -> bool:
    """Whether a video is there, whole, and was made from the same request and files."""
    from worldline.video.read import check_written
    from worldline.world import fingerprint

    output = task.item.output
    if not output.exists():
        return False
    try:
        report = json.loads(output.with_suffix(".json").read_text())
        same = report["fingerprint"] == fingerprint(opened, compute, task.request, task.item.input)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        logger.info("%s was made in another way, or not finished: made again", output)
        return False
    try:
        check_written(output, task.request.num_video_frames)
    except InputError as error:
        logger.info("%s: made again", error)
        return False
    logger.info("%s is finished", output)
    return True


def save(video: Video, task: Task) -> None:
    """Write a video with its report, and the sample that describes it."""
    if task.item.sample is not None:
        video.report["sample"] = dict(task.item.sample)
    video.save(task.item.output)


class Groups:
    """Tasks that are computed in step, group by group; what a group does not make is made alone."""

    def __init__(self, tasks: Sequence[Task], size: int, world: World) -> None:
        self.world = world
        self.count = len(tasks)
        self.groups = [list(tasks[at : at + size]) for at in range(0, len(tasks), size)]
        self.begun = 0
        self.lines: dict[Path, str] = {}
        self.refused: dict[Path, GuardrailRefusal] = {}

    def take(self, task: Task) -> str | None:
        """The line of a task that was made with its group; None if it must be made alone.

        Raises:
            GuardrailRefusal: it was refused there.
        """
        if self.groups and task is self.groups[0][0]:
            group = self.groups.pop(0)
            first, self.begun = self.begun + 1, self.begun + len(group)
            if len(group) > 1:
                self._make(group, f"{first}-{self.begun}/{self.count} in step")
        if task.item.output in self.refused:
            raise self.refused[task.item.output]
        return self.lines.pop(task.item.output, None)

    def _make(self, group: list[Task], label: str) -> None:
        try:
            jobs = [
                self.world.prepare(t.item.input, {}, input_type=t.item.kind, request=t.request)
                for t in group
            ]
            with Progress(label) as progress:
                for index, step in self.world.run_batch(jobs):
                    if step.video is None:
                        progress.report(step)
                        continue
                    save(step.video, group[index])
                    output = group[index].item.output
                    self.lines[output] = describe_video(step.video, output)
        except GuardrailRefusal as refusal:
            for index, error in refusal.refusals.items():
                self.refused[group[index].item.output] = error
            return
        except Exception as error:
            if is_disk_full(error):
                raise
            logger.warning("%s: %s; made one by one", label, one_line(error))
            if is_out_of_memory(error):
                self.groups = []
        else:
            return
        free_memory()


def describe_world(world: World) -> str:
    """One line about what was loaded."""
    loading = world.loading.as_dict()
    return (
        f"{world.name} ({world.parameters / 1e6:,.1f} M parameters) on {world.device}; loaded in "
        f"{loading['seconds']:.1f} s, {loading['peak_gb']:.2f} GB"
    )


def describe_video(video: Video, path: Path) -> str:
    """One line about a video: where it is, and what it took."""
    report = video.report
    run = report["run"]
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in run["stages"])
    count, height, width = video.frames.shape[:3]
    rates = (("tokens_per_second", "tokens/s"), ("seconds_per_step", "s a step"))
    rate = "".join(f"{report[key]} {unit}, " for key, unit in rates if report.get(key) is not None)
    attention = f", {report['attention']}" if "attention" in report else ""
    together = f"{report['clips_at_once']} in step, " if report.get("clips_at_once", 1) > 1 else ""
    return (
        f"{path}: {count} frame{'s' if count > 1 else ''} of {width} x {height}, "
        f"seed {report['request']['seed']}, {run['seconds']:.1f} s ({stages}), {together}{rate}"
        f"peak memory {run['peak_gb']:.2f} GB; worldline {report['worldline']}, "
        f"torch {report['torch']}{attention}"
    )
