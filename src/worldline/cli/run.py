"""What every command that makes videos does: name them, leave out finished ones, run, tell.

A command reads its inputs and makes the requests; from there on the families have this in common.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from worldline.cli.batch import (
    free_memory,
    is_disk_full,
    one_line,
    run_each,
    tell_all,
    tell_nothing_left,
)
from worldline.errors import Error, GuardrailRefusal, InputError, joined_stages

if TYPE_CHECKING:
    from worldline.cli.inputs import Item
    from worldline.world import Step, Video

logger = logging.getLogger(__name__)

# names of formats that are not written; another ending after a dot is part of the name
_UNWRITTEN = (".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".3gp")
# of the files beside a video: its report, its prompt
_BESIDE = (".json", ".txt")
_UNDECIDING = {"preview_every"}  # fields of requests
ENCODING = ("text_encoder", "text_encoder_dtype")  # in reports, of what encodes prompts
_STAGES = {
    "guardrail": "asking the guardrails",
    "upsample": "writing the prompt",
    "text": "encoding the prompt",
    "encode": "encoding",
    "tokens": "drawing {total:,} tokens",
    "denoise": "denoising in {total} steps",
    "decode": "decoding",
}
# kind of step -> unit, and the format of its bar on a terminal; a step takes seconds
_BARS = {
    "tokens": ("token", None),
    "denoise": (
        "step",
        "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]",
    ),
}
NUMBERED = {"video_save_name": "videos of a batch are numbered"}
DEVICE_HELP = "cuda, cuda:1, cpu, mps…; by default the GPU, if there is one."

Option = Callable[[Callable[..., None]], Callable[..., None]]


@dataclass(frozen=True)
class Task:
    """One video to make.

    Attributes:
        item: what it is made from.
        request: how; a frozen dataclass.
        output: where it goes.
        files: by role, the files beside those of the world that decide what it shows; None where
            the role has no file.
        resolved: entries of the report that decide what it shows too, as they will be; where they
            have the name of a field of the request, they stand for it.
        preview_fps: frames a second of early looks; None where there are none.
        undeciding: of all these the names that have no effect on what it shows; which ones must
            follow from those that have one, since an earlier video is compared by these alone.
    """

    item: Item
    request: Any
    output: Path
    files: dict[str, Path | None] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    preview_fps: float | None = None
    undeciding: Collection[str] = ()


def output_options() -> tuple[Option, ...]:
    """Return the options that say where videos go."""
    return (
        click.option(
            "--video_save_name",
            default="output",
            show_default=True,
            help="Of a single video, without .mp4; .mov .mkv .webm .gif choose another format.",
        ),
        click.option(
            "--video_save_folder",
            default="outputs/",
            show_default=True,
            help="Where the videos go; made if it is not there.",
        ),
        click.option(
            "--resume", is_flag=True, help="Keep videos that an earlier run made in the same way."
        ),
    )


def guardrail_options(checked: str) -> tuple[Option, ...]:
    """Return the options of guardrails; `checked` says what they look at."""
    return (
        click.option(
            "--disable_guardrail",
            is_flag=True,
            help=f"Do not check {checked}. Bundled models have no guardrails.",
        ),
        offload_option("offload_guardrail_models"),
        guardrail_dir_option(),
    )


def guardrail_dir_option() -> Option:
    """Return the option that says where the guardrails' files lie."""
    return click.option(
        "--guardrail_dir",
        help="Holds blocklist, video_content_safety_filter and face_blur_filter.  [default: the "
        "released places below --checkpoint_dir]",
    )


def machine_options() -> tuple[Option, ...]:
    """Return the options that say what the world runs on."""
    return (
        click.option(
            "--num_gpus",
            type=int,
            default=1,
            show_default=True,
            help="How many to run on; 1 alone in this version.",
        ),
        click.option("--device", help=DEVICE_HELP),
    )


def offload_option(name: str, *, negatable: bool = False, default: bool = False) -> Option:
    """Return the option that keeps a part in host memory; `negatable` has a --no_… too."""
    part = name.removeprefix("offload_").removesuffix("_model").replace("_", " ")
    transformers = dict.fromkeys(("ar", "diffusion"), "transformer")
    called = {**transformers, "guardrail models": "guardrails"}.get(part, part)
    plural = called.endswith("s")
    told = f"Keep the {called} in host memory while {'they are' if plural else 'it is'} not used"
    told += "; on by default." if default else "."
    spelling = f"--{name}/--no_{name}" if negatable else f"--{name}"
    return click.option(spelling, is_flag=True, default=default, help=told)


def with_options(options: Sequence[Option]) -> Option:
    """Return what adds options to a command, shown in their order."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def given_flags(context: click.Context) -> set[str]:
    """Return the names of the options that stand on the command line."""
    return {
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def refuse_several_gpus(num_gpus: int, flag: str = "num_gpus") -> None:
    """Refuse to run on more than one GPU, or as one of several processes.

    Raises:
        InputError: that is asked for.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if num_gpus != 1:
        raise InputError(f"--{flag} is {num_gpus}; this version runs on 1 GPU: give --{flag} 1")
    if processes != "1":
        raise InputError(
            f"started as {processes} processes (WORLD_SIZE); this version runs on 1 GPU: "
            "start it without torchrun"
        )


def choose_one(flags: dict[str, Any], names: Sequence[str], missing: str) -> str:
    """Return which one of the flags that exclude each other is given.

    Raises:
        InputError: none is, which `missing` says; several are; or the one is empty.
    """
    named = [name for name in names if flags[name] is not None]
    if not named:
        raise InputError(missing)
    if len(named) > 1:
        raise InputError(f"--{' and --'.join(named)} exclude each other: give one")
    refuse_empty(flags, named)
    return named[0]


def refuse_empty(flags: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse an empty text where a name or a path belongs; it would stand for the current folder.

    Raises:
        InputError: one of the flags is empty.
    """
    for name in names:
        if flags[name] == "":
            raise InputError(f"--{name} is empty")


def refuse_absent(flags: dict[str, Any], name: str) -> None:
    """Refuse a path that leads nowhere; the flag may be left out.

    Raises:
        InputError: nothing is there.
    """
    if flags[name] is not None and not Path(flags[name]).exists():
        raise InputError(f"--{name} {flags[name]}: no such file")


def log_without_effect(given: Collection[str], reasons: dict[str, str]) -> None:
    """Say which of the given flags do nothing, and why."""
    for name, reason in reasons.items():
        if name in given:
            logger.info("--%s has no effect: %s", name, reason)


def log_guardrails(
    name: str, flags: dict[str, Any], given: Collection[str], disable: str = "disable_guardrail"
) -> None:
    """Say which flags have no effect with the guardrails, or without.

    Args:
        name: of the model.
        flags: of the command.
        given: those that stand on the command line.
        disable: the one that does without; where it is given as false, bundled models have them.
    """
    from worldline.catalog import is_bundled

    reasons = dict.fromkeys(("offload_guardrail_models", "guardrail_dir"), "no guardrail runs")
    if not flags[disable] and (disable in given or not is_bundled(name)):
        reasons = {"preview_every": "no frames are shown before the guardrails have seen the video"}
    elif is_bundled(name):
        reasons[disable] = f"{name} has no guardrails"
    log_without_effect([each for each in given if flags[each]], reasons)


def guard_offload_flags(guarded: bool, upsampled: bool = False) -> tuple[str, ...]:
    """Return the flags that keep in host memory what stands around a world, where it is there."""
    there = {"offload_prompt_upsampler": upsampled, "offload_guardrail_models": guarded}
    return tuple(flag for flag, runs in there.items() if runs)


def log_bundled(name: str, given: Collection[str]) -> None:
    """Say what to expect of a bundled world, and which flags it has no use for."""
    from worldline.locate import bundled_names

    if name not in bundled_names():  # another name of their form is refused later
        return
    logger.info(
        "%s knows generated clips of moving shapes alone; of others it makes coloured fog", name
    )
    log_without_effect(given, {"checkpoint_dir": f"{name} is bundled"})


def choose_outputs(
    items: Sequence[Item], flags: dict[str, Any], *, batch: bool, read: Sequence[Path] = ()
) -> list[Path]:
    """Name the videos, and make sure that they can be written and overwrite no input.

    Args:
        items: what is made into videos.
        flags: of the command; video_save_folder, video_save_name and, where the command has it,
            preview_every are used.
        batch: whether the videos are numbered.
        read: files beside those of the items that must not be overwritten.

    Raises:
        InputError: the folder cannot be written, a name is none, or an input is in the way.
    """
    from worldline.video.read import IMAGE_SUFFIXES
    from worldline.video.write import ENCODINGS, check_destination

    folder = Path(flags["video_save_folder"])
    name = flags["video_save_name"]
    if not batch and not Path(name).name:
        raise InputError(f"--video_save_name {name!r} is no name")
    suffix = Path(name).suffix.lower()
    if not batch and suffix in (*_UNWRITTEN, *IMAGE_SUFFIXES):
        raise InputError(
            f"--video_save_name {name}: cannot write {suffix}; use {' '.join(ENCODINGS)}, "
            "or a name without suffix for .mp4"
        )
    if batch:
        outputs = [folder / f"{item.number}.mp4" for item in items]
    elif suffix in ENCODINGS:
        outputs = [folder / name]
    else:
        outputs = [folder / f"{name}.mp4"]
    for output in outputs:
        check_destination(output)
    check_folder(outputs[0].parent, "--video_save_folder")
    ways = "--video_save_folder" if batch else "--video_save_folder or --video_save_name"
    refuse_overwriting(outputs, [*(item.path for item in items), *read], flags, ways)
    return outputs


def refuse_overwriting(
    outputs: Sequence[Path], read: Sequence[Path | None], flags: dict[str, Any], ways: str
) -> None:
    """Refuse to write where something is read from, and where a folder is in the way.

    Args:
        outputs: videos; what lies beside them is written too.
        read: files that must stay; None are passed over.
        flags: of the command; preview_every is used where the command has it.
        ways: flags that choose another place.

    Raises:
        InputError: an input is in the way, or a folder.
    """
    kept = {path.resolve() for path in read if path}
    for output in outputs:
        beside = [output.with_suffix(ending) for ending in _BESIDE]
        for path in beside:  # `check_destination` has looked at the video itself
            if path.is_dir():
                raise InputError(f"{path} is a folder; choose another {ways}")
        if flags.get("preview_every"):
            beside.append(_preview_of(output))
        for written in (output, *beside):
            if written.resolve() in kept:
                raise InputError(f"{written} is an input; choose another {ways}")


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


def left_to_do(
    tasks: Sequence[Task], flags: dict[str, Any], identity: Callable[[], dict[str, Any]]
) -> Sequence[Task]:
    """Return the tasks; to resume, those that are not finished. Says where nothing is left.

    A task is finished when its video is there, whole, and was made from these files in this way.

    Args:
        tasks: all of them.
        flags: of the command.
        identity: returns that of the world, as its reports hold it.
    """
    if not flags["resume"]:
        return tasks
    known, left = identity(), []
    for task in tasks:
        if not task.output.exists():
            left.append(task)
        elif not _is_finished(task, known):
            logger.info("%s was made in another way, or not finished: made again", task.output)
            left.append(task)
        elif told := _damage(task):
            logger.info("%s: made again", told)
            left.append(task)
        else:
            logger.info("%s is finished", task.output)
    if not left:
        tell_nothing_left(len(tasks), tasks[0].output.parent)
    return left


def undeciding(guidance: float, *, encodes: bool) -> list[str]:
    """Return what has no effect on a video that is denoised, by the names of `Task`.

    Args:
        guidance: 0 asks for no branch without the prompt.
        encodes: whether prompts are encoded, not all given as embeddings.
    """
    return [*([] if guidance else ["negative_prompt"]), *(() if encodes else ENCODING)]


def _is_finished(task: Task, identity: dict[str, Any]) -> bool:
    from worldline.files import stamp

    try:
        report = json.loads(task.output.with_suffix(".json").read_text())
        files = {role: path and stamp(path) for role, path in task.files.items()}
        left_out = _UNDECIDING | set(task.undeciding)
        if _without(report["files"], left_out) != _without({**identity, **files}, left_out):
            return False
        resolved = {n: value for n, value in task.resolved.items() if n not in left_out}
        if any(report[name] != value for name, value in resolved.items()):
            return False
        left_out |= task.resolved.keys()
        return _without(report["request"], left_out) == _without(vars(task.request), left_out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _damage(task: Task) -> str:
    """Return what is wrong with the file of a video that was made as the task says; "" if nothing.

    The file is looked at, not its report: so this holds of reports of every version.
    """
    from worldline.video.read import check_written

    try:
        # None is the model's own number, which is not known here
        check_written(task.output, getattr(task.request, "num_video_frames", None))
    except InputError as error:
        return str(error)
    return ""


def _without(stated: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the entries that decide; a report may lack one that is None."""
    kept = (item for item in stated.items() if item[0] not in names)
    return {name: value for name, value in kept if value is not None}


@contextmanager
def memory_advice(flags: dict[str, Any], offload_flags: Sequence[str]) -> Iterator[None]:
    """Turn an exhausted device into an error that names the flags which help."""
    from worldline.cli import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        detail = str(error).splitlines()[0].rstrip(".") if str(error) else "no memory left"
        on_host = isinstance(error, MemoryError)  # where offloading would need more, not less
        left = [f"--{name}" for name in offload_flags if not flags[name] and not on_host]
        lower = "lowers" if len(left) == 1 else "lower"
        advice = f"; {' and '.join(left)} {lower} the need" if left else ""
        raise Error(f"out of memory: {detail}{advice}") from error


def run_tasks(
    tasks: Sequence[Task],
    load: Callable[[], Any],
    stream: Callable[[Any, Task], Iterator[Step]],
    flags: dict[str, Any],
    offload_flags: Sequence[str],
    *,
    batch: bool,
    before: int = 0,
    at_once: int = 1,
    stream_group: Callable[[Any, Sequence[Task]], Iterator[tuple[int, Step]]] | None = None,
) -> None:
    """Load the world, make the videos one after another, and say what came of it.

    Args:
        tasks: what to make, at least one.
        load: returns the world.
        stream: begins a task on the world.
        flags: of the command.
        offload_flags: which of them keep a part in host memory.
        batch: whether to go on after a task that fails.
        before: how many others were asked for and are finished.
        at_once: how many are made in step.
        stream_group: begins several tasks on the world; tells of each by its place.

    Raises:
        Error: an item failed; the others of the batch were made.
        GuardrailRefusal: none failed, but one was refused.
    """
    with memory_advice(flags, offload_flags):
        world = load()
    if world.device.type == "cpu":
        used = [name for name in offload_flags if flags[name]]
        log_without_effect(used, dict.fromkeys(used, "the model runs on the CPU"))
    logger.info("%s", describe_world(world))

    groups: _InStep | None = None
    if stream_group is not None and at_once > 1:
        groups = _InStep(tasks, at_once, partial(stream_group, world))

    def make(task: Task, label: str) -> str:
        if groups is not None and (line := groups.take(task)) is not None:
            return line
        preview = _Preview(task.output, task.preview_fps)
        try:
            with memory_advice(flags, offload_flags):
                video = follow(stream(world, task), label, preview.show)
            video.save(task.output)
        finally:
            preview.remove()
        return describe_video(video, task.output)

    failed, refused = run_each(tasks, make, lambda task: task.item, batch=batch)
    made, total = len(tasks) - failed - refused.total(), before + len(tasks)
    if batch or total > 1:
        tell_all(made, before, total, tasks[0].output.parent)
    if failed:
        raise Error(f"{failed} of {total} inputs failed; --resume tries them alone")
    if refused:
        counts = ", ".join(f"{count} by the {stage}" for stage, count in sorted(refused.items()))
        raise GuardrailRefusal(
            f"{refused.total()} of {total} inputs were refused: {counts}",
            joined_stages(refused),
        )


class _Preview:
    """An early look beside the video to come; gone when the run is over, whatever its end.

    A file that has its name already stays, and there is no look.
    """

    def __init__(self, output: Path, fps: float | None) -> None:
        self.path = _preview_of(output)
        self.fps = fps
        self.shown = False
        self._taken = False

    def show(self, step: Step) -> None:
        """Replace the look by a later one; a disk that refuses it does not end the run."""
        from worldline.video.write import write_video

        assert step.preview is not None
        assert self.fps is not None
        if self._taken:
            return
        if not self.shown and os.path.lexists(self.path):
            self._taken = True
            logger.warning("no preview: %s is not of this run, and stays", self.path)
            return
        try:
            write_video(step.preview, self.path, self.fps)
        except Error as error:
            logger.warning("no preview: %s", error)
            return
        first, self.shown = not self.shown, True
        if first:
            logger.info("preview, replaced as it improves: %s", self.path)

    def remove(self) -> None:
        if self.shown:
            self.path.unlink(missing_ok=True)


def _preview_of(output: Path) -> Path:
    return output.with_suffix(f".preview{output.suffix}")


def describe_world(world: Any) -> str:
    """Return one line about what was loaded."""
    loading = world.loading.as_dict()
    return (
        f"{world.name} ({world.parameters / 1e6:,.1f} M parameters) on {world.device}; "
        f"loaded in {loading['seconds']:.1f} s, {loading['peak_gb']:.2f} GB"
    )


def describe_video(video: Video, path: Path) -> str:
    """Return where a video is, and what it took."""
    report = video.report
    run = report["run"]
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in run["stages"])
    count, height, width = video.frames.shape[:3]
    rates = (("tokens_per_second", "tokens/s"), ("seconds_per_step", "s a step"))
    told = "".join(f"{report[key]} {unit}, " for key, unit in rates if report.get(key) is not None)
    together = f"{report['clips_at_once']} in step, " if report.get("clips_at_once", 1) > 1 else ""
    return (
        f"{path}: {count} frame{'s' if count > 1 else ''} of {width} x {height}, "
        f"seed {report['request']['seed']}, {run['seconds']:.1f} s ({stages}), {together}{told}"
        f"peak memory {run['peak_gb']:.2f} GB; worldline {report['worldline']}, "
        f"torch {report['torch']}, {report['attention']}"
    )


def follow(steps: Iterator[Step], label: str, show: Callable[[Step], None] | None = None) -> Video:
    """Run a request to its end; show a bar on a terminal, else a line a stage.

    Args:
        steps: of the request.
        label: names it.
        show: is given the steps that carry a preview.
    """
    with _Progress(label) as progress:
        for step in steps:
            if step.video is not None:
                return step.video
            progress.tell(step)
            if show is not None and step.preview is not None:
                progress.clear()  # what is said of the preview has a line of its own
                show(step)
    raise AssertionError("a stream ends with its video")


class _Progress:
    """What a user sees while steps go by."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.told = ""
        self.before: set[str] = set()
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.clear()

    def tell(self, step: Step) -> None:
        from tqdm import tqdm

        if step.kind != self.told:
            self.told = step.kind
            self._close()
            if step.kind == "guardrail":  # the label may be words that it will refuse
                logger.info("%s", _STAGES[step.kind])
            elif not sys.stderr.isatty():
                line = _STAGES[step.kind].format(total=step.total)
                if step.kind in self.before:  # of a video that is made in parts
                    line += f", {step.done:,} are done"
                logger.info("%s: %s", self.label, line)
                self.before |= {step.kind} & _BARS.keys()
            elif step.kind in _BARS:
                unit, shape = _BARS[step.kind]
                self.bar = tqdm(
                    total=step.total,
                    initial=step.done,
                    desc=self.label,
                    unit=unit,
                    bar_format=shape,
                    leave=False,
                )
        if self.bar is not None:
            self.bar.update(step.done - self.bar.n)


class _InStep:
    """Tasks that are made in step, group by group; what a group does not make is made alone."""

    def __init__(
        self,
        tasks: Sequence[Task],
        size: int,
        stream: Callable[[Sequence[Task]], Iterator[tuple[int, Step]]],
    ) -> None:
        self.count, self.stream = len(tasks), stream
        self.groups = [list(tasks[at : at + size]) for at in range(0, len(tasks), size)]
        self.begun = 0
        self.lines: dict[Path, str] = {}
        self.refused: dict[Path, GuardrailRefusal] = {}

    def take(self, task: Task) -> str | None:
        """Return the line of a task that was made with its group; None if it must be made alone.

        Raises:
            GuardrailRefusal: it was refused there.
        """
        if self.groups and task is self.groups[0][0]:
            group = self.groups.pop(0)
            first, self.begun = self.begun + 1, self.begun + len(group)
            if len(group) > 1:
                self._make(group, f"{first}-{self.begun}/{self.count} in step")
        if task.output in self.refused:
            raise self.refused[task.output]
        return self.lines.pop(task.output, None)

    def _make(self, group: list[Task], label: str) -> None:
        from worldline.cli import is_out_of_memory

        try:
            with _Progress(label) as progress:
                for number, step in self.stream(group):
                    if step.video is None:
                        progress.tell(step)
                        continue
                    output = group[number].output
                    step.video.save(output)
                    self.lines[output] = describe_video(step.video, output)
        except GuardrailRefusal as refusal:
            for number, error in refusal.refusals.items():
                self.refused[group[number].output] = error
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
