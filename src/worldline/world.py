"""A loaded world model and the videos it makes: the public Python interface."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from worldline.errors import (
    Error,
    GuardrailRefusal,
    InputError,
    InsufficientMemoryError,
    NonFiniteError,
    option,
)
from worldline.family import FAMILIES, Compute, Opened, Parts, requests_of
from worldline.files import digest, stamp
from worldline.guards import (
    Checks,
    Guards,
    check_frames,
    files_of,
    load_guards,
    release_of,
    rewrites,
)
from worldline.inputs import Form, Input, InputType, changes, describe, joined, kind_of, read_clip
from worldline.locate import locate
from worldline.memory import Plan, held_bytes
from worldline.opening import (
    arrange,
    choose_compute,
    choose_sharding,
    describe_plan,
    load_parts,
    open_world,
    plan,
)
from worldline.parallel.job import share, stop
from worldline.parallel.mesh import Axis
from worldline.report import Recorder, environment, log_result
from worldline.request import Name, Request
from worldline.step import Progress, Step, Video, finish, numbered
from worldline.video.read import Clip
from worldline.video.span import Span

logger = logging.getLogger(__name__)


def load(name: str | PathLike[str], **options: Any) -> World:
    """Load a world model; for a bundled one on the CPU, torch computes on one thread from then on.

    Args:
        name: "tiny-…" for a model that ships with the package, the name of a folder below
            `checkpoint_dir`, a path of a folder or file, or a released name such as
            "2B/post-trained".
        options: load options, listed by family below; and of the fields of requests
            num_video_frames, height and width of the largest video for which there must be room,
            by default the model's own. There is room for a batch of `batch_size`; if auto, of as
            many as fit where that saves time. Clips beyond it wait for the next batch.

    Raises:
        CheckpointError: files are absent, damaged or of another model.
        InputError: an option is unknown or wrong.
        InsufficientMemoryError: the device is too small.
    """
    size = {n: options.pop(n) for n in {"num_video_frames", "height", "width"} & options.keys()}
    opened = open_world(locate(name, options.get("checkpoint_dir", "checkpoints")), options)
    clips = [opened.family.request.parse({**opened.defaults, **size})]
    compute = arrange(opened, clips, choose_compute(opened.options))
    count, groups = getattr(opened.options, "batch_size", 1), compute.mesh.layout.dp
    if count != "auto":
        return load_world(opened, clips * count * groups, compute)
    most = opened.family.max_batch_size(opened, compute) or 1
    return load_world(opened, clips * most * groups, compute, compiled=1)  # there may be no batch


def load_world(
    opened: Opened,
    requests: Sequence[Request],
    compute: Compute | None = None,
    *,
    upsample: bool = True,
    compiled: int | None = None,
) -> World:
    """Load an opened model with room for the largest of some requests, or for a batch of them.

    Args:
        opened: the model.
        requests: parsed ones.
        compute: device and precision; by default as the load options choose.
        upsample: whether any prompt may be rewritten.
        compiled: clips in step that kernels are compiled for; by default as many as have room.

    Raises:
        CheckpointError: a guardrail, the prompt upsampler or the weights cannot be read.
        InsufficientMemoryError: the device is too small.
    """
    compute = compute or arrange(opened, requests, choose_compute(opened.options))
    if opened.place.bundled and compute.device.type == "cpu":
        torch.set_num_threads(1)  # tiny networks: on busy cores threads wait for each other
    together = compute.mesh.world.together
    guards = together(partial(load_guards, opened, compute, upsample=upsample))
    needed = partial(plan, opened, requests, guardrail_bytes=guards.guardrail_bytes)
    compute = choose_batch_size(opened, requests, compute, needed, guards.advice)
    if compute.sharded:
        logger.info("each process holds a part of the blocks, which are gathered when used")
    if compute.mesh.world.count > 1:
        for line in describe_plan(opened, compute, needed):
            logger.info("%s", line)
    recorder = guards.loading.followed_by(Recorder(compute.device))
    first = replace(compute, batch_size=compiled or compute.batch_size)
    parts = together(partial(load_parts, opened, first, recorder))
    return World(replace(parts, compute=compute), guards, recorder)


def choose_batch_size(
    opened: Opened,
    requests: Sequence[Request],
    compute: Compute,
    needed: Callable[[Compute], Plan],
    advice: str = "",
) -> Compute:
    """Compute with the clips made in step: as chosen, or as many as fit where that saves time.

    All processes choose alike, each by the memory of its own device.

    Args:
        opened: the model.
        requests: checked ones.
        compute: device, precision and processes.
        needed: memory plan of the requests.
        advice: end of a message about too little memory.

    Raises:
        InsufficientMemoryError: they do not fit, or not even one does.
    """
    chosen = getattr(opened.options, "batch_size", 1)
    most = opened.family.max_batch_size(opened, compute)
    auto = chosen == "auto"
    groups = compute.mesh.layout.dp
    size = min(-(-len(requests) // groups), most or 1 if auto else chosen)
    if most is not None and size > most:
        logger.info(
            "%s: %d are computed in step, the most possible", option("batch_size", chosen), most
        )
        size = most

    def refuse_unless_fits(compute: Compute) -> None:
        planned = needed(compute)
        beside = 0 if compute.device.type == "cuda" else planned.peak()
        counts = {"batch_size": size, "data_parallel": groups}
        names = " or ".join(option(name) for name, count in counts.items() if count > 1)
        smaller = f"; a smaller {names} needs less" if names else ""
        planned.refuse_unless_fits(compute.device, opened.options.offloaded, advice + smaller)
        for request in requests:
            check_frames(opened, request, size, beside)

    while True:
        compute = replace(compute, batch_size=size)
        try:
            return choose_sharding(opened, compute, refuse_unless_fits, compute.mesh.world)
        except InsufficientMemoryError:
            if not auto or size == 1:
                raise
            size -= 1


@dataclass(frozen=True)
class Job:
    """One video to make, of a checked request.

    Attributes:
        clip: frames of the input.
        recorder: of the stages that are this video's alone.
        source: report entries of the files that were read.
    """

    input: Form | None
    clip: Clip | None
    request: Any
    recorder: Recorder
    source: Mapping[str, Any]


class World:
    """A world model, ready to make videos; made by `worldline.load`."""

    def __init__(self, parts: Parts, guards: Guards, loading: Recorder) -> None:
        self.parts = parts
        self.opened = parts.opened
        self.name = self.opened.name
        self.device = parts.compute.device
        self.guards = guards
        self.loading = loading
        self._notes: set[str] = set()

    def __repr__(self) -> str:
        return f"World({self.name!r}, '{self.device}')"

    @property
    def processes(self) -> Axis:
        """Those that make a video together; the first has it in the end."""
        return self.parts.compute.mesh.video

    @property
    def parameters(self) -> int:
        """Number of weights of the transformer."""
        count: int = self.opened["transformer"].num_parameters
        return count

    def generate(
        self,
        input: Input | None = None,
        *,
        input_type: InputType | None = None,
        progress: Progress = False,
        **options: Any,
    ) -> Video:
        """Video of a prompt, or of what happens next in an image or a clip.

        With `progress=True` a bar runs on standard error; a function gets each `Step`, and what it
        raises ends the request. Other arguments, options and errors are those of `stream`.
        """
        stream = partial(self.stream, input, input_type=input_type, **options)
        made = finish(stream, progress, bar=self.processes.first)
        video = self.processes.once(lambda: made)
        assert video is not None, "a stream ends with its video"
        return video if self.processes.first else replace(video, saves=False)

    def stream(
        self, input: Input | None = None, *, input_type: InputType | None = None, **options: Any
    ) -> Generator[Step, None, None]:
        """Steps of the video that `generate` makes; the last carries it.

        Where guardrails check videos, no step before the last carries frames. Only the first of
        the processes that make a video together has frames.

        Args:
            input: a file, a PIL image or a list of them, or frames uint8 (T, H, W, 3) as an array
                or a tensor; None starts from the prompt alone.
            input_type: "image" or "video"; by default what the input is.
            options: below, by family.

        Raises:
            InputError: the input or an option is wrong; raised before the first step.
            GuardrailRefusal: the prompt or the video was refused.
        """
        job = self.prepare(input, options, input_type=input_type)
        return (step for _, step in self._follow([job]))

    def stream_batch(
        self,
        inputs: Sequence[Input],
        each: Sequence[Mapping[str, Any]],
        *,
        input_type: InputType | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Step]]:
        """Steps of several videos and the index of each; computed together where a family can.

        Each video is the one that its input gives alone.

        Args:
            inputs: as of `stream`.
            each: options of each input alone: seed, prompt, prompt_embeddings.
            input_type: of all inputs.
            options: of all inputs.

        Raises:
            InputError: an input or an option is wrong; raised before the first step.
            GuardrailRefusal: prompts or videos were refused; raised after the others are done.
        """
        if isinstance(inputs, str | PathLike) or not 0 < len(inputs) == len(each):
            raise InputError(
                f"{len(inputs)} inputs and options of {len(each)}; give two lists as long, of 1 or "
                "more"
            )
        fields = {"seed", "prompt", "prompt_embeddings"}
        if unknown := sorted(set().union(*each) - fields):
            raise InputError(f"{', '.join(unknown)}: no option of one input; {sorted(fields)} are")
        jobs = [
            self.prepare(input, {**options, **one}, input_type=input_type)
            for input, one in zip(inputs, each, strict=True)
        ]
        if len({job.request.num_input_frames for job in jobs}) > 1:
            raise InputError("images and videos cannot be continued in one batch")
        size = min(len(jobs), self.parts.compute.batch_size)
        self.processes.together(partial(check_frames, self.opened, jobs[0].request, size))
        return self._follow(jobs)

    def _follow(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Step]]:
        """Steps of several videos, of which each process reads the same, or the job ends."""
        missing, last = len(jobs), ""
        try:
            for index, step in self.run_batch(jobs):
                missing -= step.video is not None
                last = f"{step.kind} {step.done} of {step.total}"
                yield index, step
        except GeneratorExit as early:
            if missing:
                stop(self.parts.compute.mesh, last, early.__context__)
            raise

    def check(
        self, options: Mapping[str, Any], kind: InputType | None, name: Name = option
    ) -> Request:
        """Checked request for which there is room once nothing else runs; from any thread.

        Args:
            options: fields by name.
            kind: of the input.
            name: what an error calls a field.

        Raises:
            InputError: an option is wrong.
            InsufficientMemoryError: the device, or the host, is too small.
        """
        opened, family = self.opened, self.opened.family
        request = family.check(opened, family.request.make(options, opened.defaults, kind, name))
        alone, guards = replace(self.parts.compute, batch_size=1), self.guards
        planned = plan(opened, [request], alone, guardrail_bytes=guards.guardrail_bytes)
        held, cuda = held_bytes(self.device), self.device.type == "cuda"
        # which the plan leaves out, and which stay
        own = max(0, held - guards.resident_bytes)
        planned.refuse_unless_fits(self.device, opened.options.offloaded, guards.advice, own)
        check_frames(opened, request, 1, 0 if cuda else planned.peak(), 0 if cuda else own)
        return request

    def prepare(
        self,
        input: Input | None,
        options: Mapping[str, Any],
        *,
        input_type: InputType | None = None,
        request: Request | None = None,
    ) -> Job:
        """Check a request and read its input; `request` stands for options checked before.

        Raises:
            InputError: the input or an option is wrong, here or in another process, or processes
                that share a video ask for different ones.
        """
        job = self.processes.together(
            partial(self._prepare, input, options, input_type=input_type, request=request)
        )
        if self.processes.count > 1:
            made = self.opened, self.parts.compute, job.request, job.input
            same = self.processes.together(partial(fingerprint, *made, guarded=False))
            if len({*self.processes.every(same)}) > 1:
                raise InputError(
                    "processes that share a video have different requests or files; give all the "
                    f"same, or {option('data_parallel')} of their number"
                )
        return job

    def _prepare(
        self,
        input: Input | None,
        options: Mapping[str, Any],
        *,
        input_type: InputType | None,
        request: Request | None,
    ) -> Job:
        if input_type not in ("image", "video", None):
            raise InputError(f"input_type is {input_type!r}; it must be 'image' or 'video'")
        opened, family = self.opened, self.opened.family
        form: Form | None = joined(input)
        kind = None if form is None else input_type or kind_of(form)
        if request is None:
            request = family.request.make(options, opened.defaults, kind)
            request = family.check(opened, request)
        check_frames(opened, request)
        for note in family.notes(opened, request):
            if note not in self._notes:  # once for a batch
                logger.info("%s", note)
            self._notes.add(note)
        recorder, clip, notes = Recorder(self.device), None, list[str]()
        if form is not None and kind is not None:
            with recorder.stage("read"):
                clip = read_clip(form, kind, request.num_input_frames)
            if notes := changes(form, clip, request, family.video(opened, request)):
                logger.info("%s: %s", describe(form), "; ".join(notes))
        # now: files may change or vanish before the video is made
        unused, embeddings = family.unused(opened, request), _embeddings(opened, request).values()
        parts = (part for name, part in opened.parts.items() if name not in unused)
        weights = dict.fromkeys(path for part in parts for path in part.files)
        source = {
            "files": [
                *(stamp(path, sampled=True) for path in weights),
                *(stamp(path) for path in filter(None, map(_path_of, (form, *embeddings)))),
            ],
            "fingerprint": fingerprint(opened, self.parts.compute, request, form),
            "input_changes": notes,
        }
        return Job(form, clip, request, recorder, source)

    def run_batch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Step]]:
        """Steps of several videos and the index of each.

        Raises:
            NonFiniteError: numbers of the only one became NaN or infinite.
            GuardrailRefusal: all that failed were refused; raised after the others are done.
            Error: several failed, or one of several; raised after the others are done.
        """
        checks = [Checks(self.guards, job.recorder) for job in jobs]
        failures: dict[int, Error] = {}
        allowed: dict[int, Job] = {}
        for index, job in enumerate(jobs):
            try:
                before = checks[index].before(job.request, job.clip)
                request = yield from numbered(index, self.processes.steps_once(before))
                allowed[index] = replace(job, request=request)
            except Error as error:  # the prompt upsampler has errors of a prompt, too
                failures[index] = self._failed(job, error, Recorder(self.device))
        order, size = list(allowed), self.parts.compute.batch_size
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        while groups:
            group, shared = groups.pop(0), Recorder(self.device)  # of the stages in common
            finished: set[int] = set()
            try:
                for position, step in self._generate([allowed[index] for index in group], shared):
                    index = group[position]
                    if step.kind != "done":
                        # no frame leaves unchecked, or from more than one process
                        if self.guards.checks_videos or not self.processes.first:
                            step = replace(step, frames=None, preview=None)
                        yield index, step
                        continue
                    finished.add(index)
                    recorder = jobs[index].recorder.followed_by(shared)
                    peaks = self.processes.every(recorder.as_dict()["peak_gb"])
                    jobs[index].recorder.facts["peaks"] = peaks
                    videos = list[Step]()
                    made = videos, jobs[index], allowed[index], step, checks[index], shared
                    try:
                        finish = self.processes.steps_once(self._finish(*made))
                        yield from numbered(index, finish)
                        for video in videos:  # no other waits: its reader may stop here
                            yield index, video
                    except (GuardrailRefusal, NonFiniteError) as error:
                        failures[index] = self._failed(jobs[index], error, shared)
            except NonFiniteError as error:
                share(self.parts.compute.mesh, error)
                index = group[error.index]
                failures[index] = self._failed(jobs[index], error, shared)
                if rest := [other for other in group if other not in {index, *finished}]:
                    groups.insert(0, rest)  # again: each is what it is alone
        if failures:
            raise failures[0] if len(jobs) == 1 else _joined(failures, len(jobs))

    def _generate(self, jobs: Sequence[Job], shared: Recorder) -> Iterator[tuple[int, Step]]:
        family = self.opened.family
        if family.generate_together is not None:
            yield from family.generate_together(self.parts, jobs, shared)
            return
        assert family.generate is not None
        [job] = jobs
        yield from numbered(0, family.generate(self.parts, job.clip, job.request, shared))

    def _finish(
        self, videos: list[Step], job: Job, made: Job, step: Step, checks: Checks, shared: Recorder
    ) -> Generator[Step, None, None]:
        """Steps from the frames of a video to the video.

        Args:
            videos: gets the last one.
            job: as it was asked for.
            made: the same with the prompt that was used.
            step: with all frames.
            checks: of this video.
            shared: recorder of the stages that a batch has in common.
        """
        assert step.frames is not None
        log_result("decode", step.frames)
        prompt = made.request.prompt
        frames = yield from checks.after(step.frames)
        report = {
            **self._report(job, job.recorder.followed_by(shared)),
            "prompt": prompt,
            **checks.report(),
            "frames_sha256": hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest(),
        }
        video = Video(frames, job.request.fps, report, prompt)
        videos.append(Step("done", step.done, step.total, frames, video=video))

    def _failed(self, job: Job, error: Error, shared: Recorder) -> Error:
        """The error, perhaps with a report, and without its trace, which would hold the tensors."""
        if isinstance(error, NonFiniteError):
            report = self._report(job, job.recorder.followed_by(shared))
            error.report = {**report, "error": str(error)}
        return error.with_traceback(None)

    def _report(self, job: Job, recorder: Recorder) -> dict[str, Any]:
        parts, family = self.parts, self.opened.family
        text, seconds = parts.text, recorder.facts.get("seconds_of_steps", [])
        loaded = {p.flag: parts.loaded[p.name] for p in family.parts if p.name in parts.loaded}
        return {
            "model": self.name,
            "parameters": self.parameters,
            "input": None if job.input is None else describe(job.input),
            **job.source,
            "lora": [a.report() for p in parts.opened.parts.values() for a in adapters_of(p)],
            "weights": {name: part.notes for name, part in self.opened.parts.items() if part.notes},
            "request": {name: _describe(value) for name, value in job.request},
            "dtype": str(parts.compute.dtype).removeprefix("torch."),
            "text_encoder_dtype": str(text.dtype).removeprefix("torch.") if text else None,
            "offload": {
                **{flag.removeprefix("offload_"): part.offload for flag, part in loaded.items()},
                **self.guards.offloaded,
            },
            "streamed": [
                *(flag.removeprefix("offload_") for flag, part in loaded.items() if part.streamed),
                *self.guards.streamed,
            ],
            "prompt_truncation": recorder.facts.get("prompt_truncation", {}),
            "seconds_per_step": round(median(seconds), 4) if seconds else None,
            "seconds_of_steps": seconds,
            "step_cache": recorder.facts.get("step_cache"),
            **family.report(parts, job.request, recorder),
            **environment(self.device),
            **self._processes(recorder),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }

    def _processes(self, recorder: Recorder) -> dict[str, Any]:
        """Report entries of several processes: how they share the work, and the peak of each."""
        layout, peaks = self.parts.compute.mesh.layout, recorder.facts.get("peaks")
        if layout.count == 1:
            return {}
        return {"processes": str(layout), "sharded": self.parts.compute.sharded, "peaks_gb": peaks}


def _joined(failures: Mapping[int, Error], count: int) -> Error:
    """The error of a batch of so many inputs."""
    first = next(iter(failures.values()))
    stages = {error.stage for error in failures.values() if isinstance(error, GuardrailRefusal)}
    refused = all(isinstance(error, GuardrailRefusal) for error in failures.values())
    verb = "were refused" if refused else "failed"
    message = f"{len(failures)} of {count} inputs {verb}, the first: {first}"
    error = GuardrailRefusal(message, " and ".join(sorted(stages))) if refused else Error(message)
    error.failures = failures
    return error


def fingerprint(
    opened: Opened, compute: Compute, request: Request, input: Input | None, *, guarded: bool = True
) -> str:
    """Hash of everything that decides the frames of a request: what --resume compares.

    That is the request without fields that have no effect, the contents of every file that is read
    wherever it lies, what parts took from elsewhere (such as a schedule), precision, decisive load
    options, guardrails and the prompt upsampler where they run; not the device, offloading or batch
    size. The files of the last two, which one process alone may have, count where it is `guarded`.

    Raises:
        OSError: a file has vanished.
    """
    unused = opened.family.unused(opened, request)
    text = None if "text" in unused else str(compute.text_dtype)
    embeddings = _embeddings(opened, request)
    stated = {n: _describe(v) for n, v in request.effective({*unused, *embeddings}).items()}
    decisive = {
        "request": stated | {name: _contents(value) for name, value in embeddings.items()},
        "parts": {n: _settings(part) for n, part in opened.parts.items() if n not in unused},
        "input": None if input is None else _contents(input),
        "precision": [str(compute.dtype), text],
        "options": {n: v for n, v in opened.options if n in opened.options.DECISIVE},
        "release": opened.family.guardrails(opened),  # by a folder's name, it decides defaults too
        "guardrail": release_of(opened),
        "upsampled": rewrites(opened, request),
        "guards": [digest(p, sampled=True) for p in files_of(opened, request) if guarded],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _embeddings(opened: Opened, request: Request) -> dict[str, Any]:
    """Embeddings of a request that have an effect."""
    unused = opened.family.unused(opened, request)
    named = {n: v for n, v in request if n.endswith("_embeddings") and n not in unused}
    return {name: value for name, value in named.items() if value is not None}


def _settings(part: Any) -> dict[str, Any]:
    """Configuration, numbers and words of a part on disk, and the contents of its files."""
    plain = str | int | float | None
    values: dict[str, Any] = {n: v for n, v in vars(part).items() if isinstance(v, plain)}
    files = [digest(path, sampled=True) for path in part.files]
    if adapters := adapters_of(part):
        values["adapters"] = [adapter.digest for adapter in adapters]
    return {**values, "config": repr(part.config), "files": files}


def adapters_of(part: Any) -> Sequence[Any]:
    """LoRA adapters of a part on disk."""
    return getattr(part, "adapters", ())


def _contents(value: object) -> Any:
    """Hash of the file that a value names, or the value as JSON holds it."""
    path = _path_of(value)
    if path is None:
        return _describe(value)
    return [digest(path), value.identity] if isinstance(value, Span) else digest(path)


def _path_of(value: object) -> Path | None:
    return Path(value) if isinstance(value, str | PathLike) else None


def _describe(value: Any) -> Any:
    """A value as JSON holds it; a tensor or a picture by the hash of its numbers."""
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray | Image.Image):
        array = np.ascontiguousarray(value)
        return f"{list(array.shape)} {hashlib.sha256(array.data).hexdigest()}"
    return value


@cache
def document() -> None:
    """Append every family's options to the public docstrings, for `help()`."""
    for target, kind in ((World.generate, "REQUEST"), (World.stream, "REQUEST"), (load, "OPTIONS")):
        lines = ["", "Options:", ""]
        for family in FAMILIES:
            described = getattr(requests_of(family), kind).describe()
            lines += [f"{family}:", *(f"    {line}" for line in described), ""]
        if target.__doc__:  # python -OO has none
            target.__doc__ += "\n".join(f"        {line}".rstrip() for line in lines)
