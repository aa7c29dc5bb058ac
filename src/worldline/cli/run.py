"""Shared runner of commands: check items and outputs, skip what is finished, run, report."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import pickle
import select
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import click

from worldline.cli.messages import results
from worldline.cli.options import parsed, stated
from worldline.cli.progress import Progress, preview_path
from worldline.documents import read_json
from worldline.errors import (
    Error,
    GuardrailRefusal,
    InputError,
    NonFiniteError,
    counted,
    is_disk_full,
    is_out_of_memory,
    one_line,
)
from worldline.family import Command, Item, requests_of
from worldline.files import check_folder, digest
from worldline.parallel import job
from worldline.parallel.turns import Turns
from worldline.shapes import VideoShape

if TYPE_CHECKING:
    from worldline.family import Compute, Opened
    from worldline.parallel.mesh import Mesh
    from worldline.request import LoadOptions
    from worldline.step import Video
    from worldline.video.read import MediaInfo
    from worldline.world import World

logger = logging.getLogger(__name__)

_RATES = {"tokens_per_second": "tokens/s", "seconds_per_step": "s a step"}
_REMEDY = "; offload flags (--offload_…) or a smaller size need less memory"
_SHARING = ("fsdp", "guidance_parallel", "context_parallel")
_UPSAMPLER = ("offload_prompt_upsampler", "prompt_upsampler_dir", "word_limit_to_skip_upsampler")

# runs a task with its label, the first of a group in step; returns the line to print
Make = Callable[[Any, str, Sequence[Any]], str]
# that, and the number of tasks that run in step
Run = tuple[Make, int]
Load = Callable[[Sequence[Any]], Run]
# number of a task; stage of its refusal, "" of an error, None where it is done; the line to print;
# files that it replaced, or its trace
Outcome = tuple[int, str | None, str, list[str]]
ASKED = "WORLDLINE_ASKED"  # in the environment: tasks are asked for one by one
ANSWER = "worldline answers "  # begins a line on standard output then
_PATIENCE_S = 600  # for the next one; a collective may not wait for ever
# file of a video -> the line about it, or why it was not made
Outcomes = dict[Path, str | Error]


def run(family: str, command: Command, context: click.Context) -> None:
    """Make the videos that a command line asks for; all that is wrong is named before."""
    described, reader = requests_of(family), resolve_name(command.reads)
    request_flags = stated(context, described.REQUEST.flags().values())
    option_flags = stated(context, described.OPTIONS.flags().values())
    flags = parsed(context, reader.flags)
    options = described.OPTIONS.parse(option_flags)
    fleet = context.meta.get("fleet")  # whose processes do the work
    if fleet and options.processes not in (None, 1):
        raise InputError(f"fleet: {options.processes} GPUs of a video are --gpus_per_actor's")
    items, problems = reader.read(flags, request_flags)
    if not items:
        refuse_problems(problems)
    check_destinations(items, flags)
    if not items[0].place and (fleet or getattr(flags, "part", (0, 1)) != (0, 1)):
        called = "fleet" if fleet else f"--shard {flags.shard}"
        raise InputError(f"{called}: there is one input; give a file of many")
    named = stated(context, [command.model])
    model = named.get(command.model, command.default_model)
    if not model:
        raise InputError(f"--{command.model}: it is empty")
    if hasattr(reader, "model"):
        model, more = reader.model(flags, model, named)
        option_flags |= more
    if len(items) == 1:
        option_flags.pop("data_parallel", None)
    from worldline.locate import locate

    place = locate(model, options.checkpoint_dir)
    if (count := processes_to_start(options)) > 1:
        context.exit(job.launch(context.find_root().obj, count))
    # they import torch: not before the place is found
    from worldline.opening import arrange, choose_compute, open_world
    from worldline.world import fingerprint

    opened = open_world(place, option_flags, family)
    items = check_items(opened, items, problems)
    choose = fleet.choose_compute if fleet else choose_compute
    compute = choose(described.OPTIONS.parse(option_flags))
    compute = arrange(opened, [item.request for item in items], compute)
    log_unused(opened, compute, items, stated(context, context.params))
    dry = partial(rehearse, opened, compute)
    runner = fleet.run_tasks if fleet else answer_tasks if ASKED in os.environ else run_tasks
    runner(
        items,
        dry if flags.dry_run else partial(load, opened, compute, flags.quality),
        lambda item: fingerprint(opened, compute, item.request, item.input),
        flags,
        mesh=compute.mesh,
    )


def processes_to_start(options: LoadOptions) -> int:
    """Processes that a command starts on this machine; 1 where it does the work itself."""
    count = options.processes
    if job.started() or count in (None, 1):
        return 1
    if count == "auto":
        import torch

        count = max(1, torch.cuda.device_count() if options.device != "cpu" else 0)
    job.own_device(options.device, count)
    return count


def check_items(opened: Opened, items: Iterable[Item], problems: list[str]) -> list[Item]:
    """Items with their requests; an `InputError` names `problems`, and all that is wrong."""
    checked: list[Item] = []
    for item in items:
        try:
            checked.append(check_item(opened, item))
        except InputError as error:
            for line in str(error).splitlines():
                field = line.partition(" is ")[0]
                if field in opened.family.request.model_fields:
                    line = item.field(field) + line.removeprefix(field)
                elif item.place not in line and not line.startswith("--"):
                    line = f"{item.place}: {line}"
                problems.append(line)
    refuse_problems(problems)
    return checked


def refuse_problems(problems: Sequence[str]) -> None:
    """Raise `InputError` with all problems, each once."""
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def check_item(opened: Opened, item: Item) -> Item:
    """The item with its request, checked by the model's files and its input's length."""
    from worldline.guards import check_frames
    from worldline.inputs import check_file
    from worldline.video.write import check_destination

    request = opened.family.request.make(item.stated, opened.defaults, item.kind, item.field)
    request = opened.family.check(opened, request)
    check_destination(item.output, request.fps, resume=True)
    if item.input is not None:
        check_file(item.input, request, opened.family.video(opened, request))
    check_frames(opened, request)
    return replace(item, request=request)


def check_destinations(items: Sequence[Item], flags: Any) -> None:
    """Refuse videos that cannot be written, or would overwrite an input."""
    from worldline.video.write import check_destination, encoding_of

    outputs: list[Path] = []
    inputs: list[Any] = []
    for item in items:
        encoding_of(item.output, **flags.quality)
        check_destination(item.output, resume=flags.resume)
        outputs += (*companions(item.output), preview_path(item.output))
        embeddings = map(item.stated.get, ("prompt_embeddings", "negative_prompt_embeddings"))
        inputs += (item.input, *item.sources, *embeddings)
    check_outputs(outputs, map(Path, filter(None, inputs)))


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path]) -> None:
    """Refuse, before any work, files that cannot be written or are inputs."""
    for folder in {path.parent for path in outputs}:
        check_folder(folder)
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if (path.is_dir() and path.suffix) or path.resolve() in read:
            kind = "a folder" if path.is_dir() else "an input"
            raise InputError(f"{path}: it is {kind}; choose another output")


def log_unused(
    opened: Opened, compute: Compute, items: Sequence[Item], typed: Mapping[str, Any]
) -> None:
    """Log flags that were typed and have no effect."""
    from worldline.guards import release_of, upsamples

    guarded, requests = release_of(opened) is not None, [item.request for item in items]
    offload = tuple(name for name in typed if name.startswith("offload_"))
    lengths = {None, *(request.num_input_frames for request in requests)}
    rules = (
        (compute.device.type == "cpu", "the model runs on the CPU", offload),
        (not guarded, "no guardrail runs", ("offload_guardrail_models", "guardrail_dir")),
        (guarded, "the guardrails check the video before a frame leaves", ("preview_every",)),
        (not upsamples(opened), "no prompt upsampler runs", _UPSAMPLER),
        (len(items) == 1, "there is one input", ("batch_size", "data_parallel")),
        (compute.mesh.video.count == 1, "one process makes a video", _SHARING),
        (lengths == {None, 0}, "there is no input", ("fit",)),
        (
            typed.get("num_input_frames") not in lengths,
            "an image has 1 frame",
            ("num_input_frames",),
        ),
    )
    unused = {name: why for applies, why, names in rules if applies for name in names}
    each = (opened.family.unused(opened, request).items() for request in requests)
    unused |= dict(set.intersection(*map(set, each)))
    if opened.place.bundled:
        logger.info(
            "%s was trained on generated clips of moving shapes: other inputs become coloured fog",
            opened.name,
        )
    for name, value in typed.items():
        if name in unused and value is not False:
            logger.info("--%s has no effect: %s", name, unused[name])


def rehearse(opened: Opened, compute: Compute, items: Sequence[Item]) -> Run:
    """Print the memory plan of a run that loads and makes nothing; refuse what does not fit."""
    from worldline.guards import planned_weights
    from worldline.opening import describe_plan, plan
    from worldline.world import choose_batch_size

    requests = [item.request for item in items]
    needed = partial(plan, opened, requests, around=planned_weights(opened, requests))
    try:
        compute = choose_batch_size(opened, requests, compute, needed)
    finally:
        for line in describe_plan(opened, compute, needed):
            results.add(line)
    return lambda item, label, group: "", 1


def load(
    opened: Opened, compute: Compute, quality: Mapping[str, Any], items: Sequence[Item]
) -> Run:
    """Load a model; the runner makes a video, some with those that follow it, in step.

    Args:
        opened: the model.
        compute: device and precision.
        quality: keywords of `Video.save`.
        items: all that are made.
    """
    import torch

    from worldline.guards import rewrites
    from worldline.world import load_world

    requests = [item.request for item in items]
    upsample = any(rewrites(opened, request) for request in requests)
    world = load_world(opened, requests, compute, upsample=upsample)
    loading, size = world.loading.as_dict(), world.parts.compute.batch_size
    logger.info(
        f"{world.name} ({world.parameters / 1e6:,.1f} M parameters) on {world.device}; loaded in "
        f"{loading['seconds']:.1f} s, {loading['peak_gb']:.2f} GB"
    )
    outcomes: Outcomes = {}
    in_step = True  # until memory is too small

    def make_one(item: Item, label: str, group: Sequence[Item]) -> str:
        nonlocal in_step
        if in_step and len(group) > 1:
            first = items.index(item) + 1
            name = f"{first}-{first + len(group) - 1}/{len(items)} in step"
            try:
                make_videos(world, group, name, outcomes, quality)
            except Exception as error:
                if is_disk_full(error):
                    raise
                job.share(world.parts.compute.mesh, error)
                logger.warning("%s: %s; made one by one", name, one_line(error))
                in_step = not is_out_of_memory(error)
        processes = world.processes
        if not processes.once(lambda: item.output in outcomes):
            if len(group) > 1:
                free_memory()
            try:
                make_videos(world, [item], label, outcomes, quality)
            except torch.OutOfMemoryError as error:
                raise Error(f"{one_line(error)}{_REMEDY}") from error
        outcome = processes.once(lambda: outcomes.pop(item.output))  # also why it is not written
        if isinstance(outcome, Error):
            raise outcome
        return outcome

    return make_one, size


def make_videos(
    world: World,
    items: Sequence[Item],
    label: str,
    outcomes: Outcomes,
    quality: Mapping[str, Any],
) -> None:
    """Make one video, or several in step, with progress; previews come of a single one.

    The first process has the outcomes.
    """
    from worldline.video.write import write_bytes

    # a frame of a preview stands for all that a latent frame holds
    tokenizer = world.opened.get("tokenizer")
    rate = items[0].request.fps / (tokenizer.config.temporal if tokenizer else 1)
    processes = world.processes

    try:
        with ExitStack() as stack:
            if processes.first:
                progress = stack.enter_context(Progress(label, items[0].output, rate))
            jobs = [
                world.prepare(item.input, {}, input_type=item.kind, request=item.request)
                for item in items
            ]
            for index, step in world.run_batch(jobs):
                if step.video is not None:
                    outcomes[items[index].output] = attempt_save(step.video, items[index], quality)
                elif processes.first:
                    progress.report(step)
    except Error as error:
        if not error.failures and len(items) > 1:
            raise
        for index, failure in (error.failures or {0: error}).items():
            output = items[index].output
            outcomes[output] = failure
            if isinstance(failure, NonFiniteError) and processes.first and not output.exists():
                text = json.dumps(failure.report, indent=1) + "\n"
                write_bytes(output.with_suffix(".json"), text.encode())


def attempt_save(video: Video, item: Item, quality: Mapping[str, Any]) -> str | Error:
    """Line about a video that is written, or why it is not: other processes go on."""
    try:
        return save(video, item, quality)
    except Error as error:
        if is_disk_full(error):
            raise
        return error


def save(video: Video, item: Item, quality: Mapping[str, Any]) -> str:
    """Write a video and its report; one line about where it is, and what it took."""
    report = video.report
    if item.sample is not None:
        report["sample"] = dict(item.sample)
    path, run = video.save(item.output, **quality), report["run"]
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in run["stages"])
    facts = (
        in_words(VideoShape(*video.frames.shape[:3])),
        f"seed {report['request']['seed']}",
        f"{run['seconds']:.1f} s ({stages})",
        f"{clips} in step" if (clips := report.get("clips_at_once", 1)) > 1 else "",
        *(f"{report[key]} {unit}" for key, unit in _RATES.items() if report.get(key)),
        f"streamed {' and '.join(streamed)}" if (streamed := report.get("streamed")) else "",
        f"peak memory {run['peak_gb']:.2f} GB; worldline {report['worldline']}",
        f"torch {report['torch']}",
        report.get("attention"),
    )
    return f"{path}: {', '.join(filter(None, facts))}"


def in_words(size: VideoShape | MediaInfo) -> str:
    return f"{counted(size.frames, 'frame')} of {size.width} x {size.height}"


def is_finished(output: Path, fingerprint: str, quality: Mapping[str, Any]) -> bool:
    """Whether a file or folder is there, with a report of its bytes and of this fingerprint."""
    from worldline.video.read import check_written
    from worldline.video.write import encoding_of
    from worldline.weights.checkpoint import content_digest, open_checkpoint

    if not output.exists():
        return False
    reason = "was made in another way"
    try:
        if output.suffix == ".safetensors":
            stored = open_checkpoint(output)
            report: Any = stored.metadata
            tensors = {name: stored.read(name) for name in stored.entries}
            if report.get("digest") != content_digest(tensors, report):
                raise InputError("its header is of other numbers")
        else:
            report = read_json(output.with_suffix(".json"))
            if report.get("file_sha256") != digest(output):
                request = report.get("request")
                if output.is_file():  # perhaps it is damaged
                    frames = request.get("num_video_frames") if isinstance(request, dict) else None
                    check_written(output, frames)
                raise InputError("its report is of other bytes")
        encoding = report.get("encoding") in (None, encoding_of(output, **quality))
        finished = encoding and report.get("fingerprint") == fingerprint
    except (InputError, OSError) as error:
        finished, reason = False, str(error)
    logger.info("%s %s", output, "is finished" if finished else f"is made again: {reason}")
    return finished


def companions(output: Path) -> list[Path]:
    """A video's file, and those of its report and prompt."""
    return [*dict.fromkeys((output, *map(output.with_suffix, (".json", ".txt"))))]


def existing(paths: Iterable[Path], no_overwrite: bool = False) -> list[Path]:
    """Those that are there, and would be replaced; `InputError` if --no_overwrite keeps them."""
    there = [path for path in paths if os.path.lexists(path)]
    if no_overwrite and there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        names = ", ".join(map(str, there[:3]))
        raise InputError(f"--no_overwrite: {names}{more} exist; name another output")
    return there


def log_replaced(paths: Sequence[Path | str]) -> None:
    if paths:
        logger.info("replaced files of that name: %s", ", ".join(map(str, paths)))


def run_tasks(
    tasks: Sequence[Any],
    load: Load,
    fingerprint: Callable[[Any], str],
    flags: Any,
    things: str = "videos",
    *,
    mesh: Mesh,
) -> None:
    """Run tasks, which have an `output`, print a line for each, and report.

    Args:
        tasks: all that were asked for.
        load: makes the runner of the tasks that are not finished.
        fingerprint: of a task.
        flags: `OutputFlags`; with `shard` every N-th task is taken, with `resume` what an earlier
            run made in the same way is left out.
        things: what is made.
        mesh: groups of processes, which take the tasks in turns.
    """
    tasks = take_shard(tasks, flags, things)
    refuse_other_tasks(tasks, mesh)
    if not tasks:
        return
    total, folder = len(tasks), tasks[0].output.parent
    keep_going = getattr(flags, "keep_going", True)
    if getattr(flags, "resume", False):
        quality = getattr(flags, "quality", {})

        def is_missing(task: Any) -> bool:
            # one by one: to read all of a large batch may take longer than a collective may
            read = partial(is_finished, task.output)
            return not mesh.world.once(lambda: read(fingerprint(task), quality))

        tasks = [*filter(is_missing, tasks)]
    refuse_taken(tasks, flags)
    places = [f"{number}/{len(tasks)}" for number in range(1, len(tasks) + 1)]
    several = total > 1 and keep_going
    labels = [f"{p} {t}" if several else f"{t}" for p, t in zip(places, tasks, strict=True)]
    failures: Counter[str] = Counter()  # by the stage that refused; "" of errors

    def outcome(number: int, replaced: list[Path]) -> Outcome:
        group = () if number % size else tasks[number : number + size]
        make_task: Any = partial(attempt, make, mesh=mesh) if several else make
        line = make_task(tasks[number], labels[number], group)
        if isinstance(line, Error):
            return number, getattr(line, "stage", ""), one_line(line), line.__notes__[-1:]
        return number, None, line, [*map(str, replaced)]

    def account(number: int, stage: str | None, line: str, details: list[str]) -> None:
        if stage is None:
            log_replaced(details)
            results.add(line)
            return
        failures[stage] += 1
        # of a refused task the name may be words of the prompt
        logger.error("%s: %s", places[number] if stage else labels[number], line)
        logger.debug("%s", *details)

    if tasks:
        make, size = load(tasks)
    if getattr(flags, "dry_run", False):
        results.add(f"{len(tasks)} of {total} {things} to make in {folder}; none is made")
        return
    if tasks:
        turns = Turns(mesh)
        if (idle := mesh.dp.count - -(-len(tasks) // size)) > 0:
            logger.info("%d of %d groups of processes make nothing", idle, mesh.dp.count)
        while (first := size * turns.take()) < len(tasks):
            unit = range(len(tasks))[first : first + size]
            there = [existing(companions(tasks[number].output)) for number in unit]
            for number, replaced in zip(unit, there, strict=True):
                turns.post(outcome(number, replaced))
                for posted in turns.outcomes():
                    account(*posted)
        for posted in turns.outcomes(len(tasks)):
            account(*posted)
    report_tasks(len(tasks) - failures.total(), total, failures, flags, f"{things} are in {folder}")


def attempt(
    make: Make, task: Any, label: str, group: Sequence[Any], mesh: Mesh | None = None
) -> str | Error:
    """Line to print of a task; or why it was not made, with the trace as a note.

    A full disk, which others would meet, too, is raised, and what one process of several met alone.
    """
    try:
        return make(task, label, group)
    except Exception as raised:
        if is_disk_full(raised):
            raise
        if mesh:
            job.share(mesh, raised)
        # a copy, without the frames that hold its tensors
        error = copy(raised) if isinstance(raised, Error) else Error(one_line(raised))
        error.add_note(traceback.format_exc())
    free_memory()  # what the failed one held would be missing to the next
    return error


def answer_tasks(tasks: Sequence[Any], load: Load, *_: object, mesh: Mesh) -> None:
    """Make tasks whose places come on standard input, one a line, until it ends.

    Standard output has an answer to each, and one before, once they can be made: what `attempt`
    returns, pickled.
    """

    def next_place() -> bytes:
        ready, _, _ = select.select([sys.stdin], [], [], _PATIENCE_S)
        return sys.stdin.buffer.readline() if ready else b"\n"

    def answer(line: str | Error) -> None:
        click.echo(ANSWER + pickle.dumps(line).hex())

    make, _size = load(tasks)
    answer("")
    while place := mesh.world.once(next_place):
        if place.strip():
            task = tasks[int(place)]
            answer(attempt(make, task, str(task), (), mesh))


def report_tasks(made: int, total: int, failures: Counter[str], flags: Any, where: str) -> None:
    """Print how many of all are there now; raise what stands for the failures.

    Args:
        made: number of those that were made now.
        total: number of all.
        failures: number of those that failed, by the stage that refused them; "" of errors.
        flags: `OutputFlags`.
        where: end of the line, what they are and where.
    """
    before = total - made - failures.total()
    if total > 1 or before:
        since = f": {made} made now, {before} there before" if before else ""
        results.add(f"{made + before} of {total} {where}{since}")
    if failed := failures.pop("", 0):
        again = "" if getattr(flags, "resume", None) is None else "; --resume tries them again"
        raise Error(f"{failed} of {total} inputs failed{again}")
    if failures:
        stages = " and ".join(sorted(failures))
        message = f"{failures.total()} of {total} inputs were refused, by {stages}"
        raise GuardrailRefusal(message, stages)


def refuse_other_tasks(tasks: Sequence[Any], mesh: Mesh) -> None:
    """Refuse processes of one job that have read different inputs, or take different shards."""
    names = hashlib.sha256("\0".join(str(task.output) for task in tasks).encode(errors="replace"))
    if len({*mesh.world.every((len(tasks), names.digest()))}) > 1:
        raise InputError(
            "the processes of this job have different inputs; give each machine the same file of "
            "them, and --shard I/N in place of auto"
        )


def refuse_taken(tasks: Sequence[Any], flags: Any) -> None:
    """Refuse, before any work, outputs whose place is taken by what must stay."""
    from worldline.video.write import check_destination

    if getattr(flags, "resume", None):  # a finished folder of frames was allowed until now
        for folder in (task.output for task in tasks if not task.output.suffix):
            check_destination(folder)
    existing((path for task in tasks for path in companions(task.output)), flags.no_overwrite)


def take_shard(tasks: Sequence[Any], flags: Any, things: str) -> Sequence[Any]:
    """Tasks of this shard; perhaps none, which is no error."""
    index, count = getattr(flags, "part", (0, 1))
    if count == 1:
        return tasks
    shard = tasks[index::count]
    line = f"shard {index}/{count} has {len(shard) or 'none'} of {len(tasks)} {things}"
    if shard:
        logger.info(line)
    else:
        results.add(line)
    return shard


def free_memory() -> None:
    """Free unreferenced memory, on the device too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
