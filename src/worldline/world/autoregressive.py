"""Worlds that continue clips token by token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, NamedTuple

from worldline.errors import GuardrailRefusal, InputError, joined_stages
from worldline.loading import (
    AutoregressiveFiles,
    AutoregressiveParts,
    check_frames,
    most_in_step,
)
from worldline.models.predict1_ar.decoder import PlainDecoder
from worldline.pipelines.autoregressive import (
    FPS,
    Job,
    alternates,
    check_prompt,
    check_room,
    continue_clips,
    decoder_settings,
    video_of,
)
from worldline.pipelines.prompts import TRUNCATION, read_prompt_embedding
from worldline.pipelines.requests import AutoregressiveRequest
from worldline.report import Recorder, environment
from worldline.video.write import frames_sha256
from worldline.world.base import World
from worldline.world.inputs import Input, InputType, describe, kind_of, read_clip, stamp_of
from worldline.world.safety import Checks
from worldline.world.video import Step, Video

logger = logging.getLogger(__name__)

_EMBEDDINGS = "prompt_embeddings"


class _Plan(NamedTuple):
    """A clip to continue, and what its report says of where it comes from."""

    job: Job
    source: dict[str, Any]


class AutoregressiveWorld(World):
    """Continues an image or a video; a Video2World model does so by a prompt."""

    parts: AutoregressiveParts

    @property
    def files(self) -> AutoregressiveFiles:
        """What the world was read from."""
        return self.parts.files

    @property
    def video2world(self) -> bool:
        """Whether it needs a prompt."""
        return self.parts.config.context_width is not None

    def stream_batch(
        self,
        inputs: Sequence[Input],
        each: Sequence[Mapping[str, Any]],
        *,
        input_type: InputType | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Step]]:
        """Continue several inputs in step; yield which one, and a `Step` as `stream` does.

        Each becomes the video that it becomes alone. More inputs than the decoding kernels take
        are drawn group by group; steps that are made for a group are told of its first input.

        Args:
            inputs: as `stream` takes them.
            each: for each input the options that are its own: seed, prompt, prompt_embeddings.
            input_type: of all.
            options: of all.

        Raises:
            InputError: an input or an option is wrong; raised before anything runs.
            GuardrailRefusal: a prompt or a video was refused; raised when the others are done.
        """
        own = {"seed", "prompt", _EMBEDDINGS}
        if isinstance(inputs, str | PathLike) or not all(isinstance(one, Mapping) for one in each):
            raise InputError("inputs must be a list, and each a list of as many dicts of options")
        if not inputs or len(inputs) != len(each):
            raise InputError(
                f"{len(inputs)} inputs and options of {len(each)}: there must be one or more, and "
                "as many of both"
            )
        if unknown := ", ".join(sorted({name for one in each for name in one} - own)):
            has = ", ".join(sorted(own))
            raise InputError(f"unknown option {unknown}; of its own an input has {has}")
        shared = Recorder(self.device)
        plans = [
            self._plan(input, input_type, {**options, **one}, Recorder(self.device), shared)
            for input, one in zip(inputs, each, strict=True)
        ]
        self._check_frames(plans[0].job.request, len(plans))
        if len({plan.job.request.num_input_frames for plan in plans}) > 1:
            raise InputError("images and videos cannot be continued in step")
        return self._run(plans, shared)

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
        recorder = Recorder(self.device)
        plan = self._plan(input, input_type, options, recorder, recorder)
        return (step for _, step in self._run([plan], recorder))

    def _plan(
        self,
        input: Input | None,
        input_type: InputType | None,
        options: dict[str, Any],
        recorder: Recorder,
        reading: Recorder,
    ) -> _Plan:
        """Check everything and read the input, of which `reading` is told."""
        found = kind_of(input)
        assert input is not None  # told by `kind_of`
        kind = input_type or found
        known = AutoregressiveRequest.__dataclass_fields__
        if unknown := ", ".join(sorted(options.keys() - {*known, _EMBEDDINGS})):
            raise InputError(
                f"unknown option {unknown}; there are: input_type, "
                f"{', '.join((*known, _EMBEDDINGS))}"
            )
        given = options.pop(_EMBEDDINGS, None)
        if kind == "image":
            if options.get("num_input_frames", 1) != 1:
                logger.info("num_input_frames has no effect: an image has 1 frame")
            options["num_input_frames"] = 1
        request = AutoregressiveRequest(**options)
        configs = self.parts.config, self.parts.tokenizer.module.config
        check_room(*configs, request)
        self._check_frames(request, 1)
        embedding = None
        stamps = {"input": stamp_of(input)}
        if self.video2world:
            width = self.parts.config.context_width
            assert width is not None
            embedding = read_prompt_embedding(given, self.files.context_length, width)
            stamps[_EMBEDDINGS] = stamp_of(given)
        elif given is not None:
            raise InputError(f"{self.files.folder} is a base model, which takes no prompt")
        check_prompt(self.files, request, embedding)
        source = {"input": describe(input), "files": {**self.identity, **stamps}}
        with reading.stage("read"):
            clip = read_clip(input, kind, request.num_input_frames)
        return _Plan(Job(clip, request, recorder, embedding), source)

    def _at_once(self, clips: int) -> int:
        """Return how many of these clips are drawn in step."""
        weight = self.parts.transformer.module.head.weight
        return min(clips, most_in_step(self.files, self.device, weight.dtype) or clips)

    def _check_frames(self, request: AutoregressiveRequest, clips: int) -> None:
        """Refuse clips whose frames find no room in host memory."""
        configs = self.parts.config, self.parts.tokenizer.module.config
        held = self._at_once(clips) if alternates(*configs, request) else 1
        check_frames(video_of(*configs, request), clips=held, guarded=self.safety.checks_videos)

    def _run(self, plans: Sequence[_Plan], shared: Recorder) -> Iterator[tuple[int, Step]]:
        """Yield which clip, and a step; what is refused does not stop the others."""
        checks = [self.safety.begin(plan.job.recorder) for plan in plans]
        refusals: dict[int, GuardrailRefusal] = {}
        live: list[int] = []  # clips whose prompt is not refused
        for number, plan in enumerate(plans):
            prompt = plan.job.request.prompt
            try:
                if self.video2world and checks[number].on:
                    if plan.job.embedding is not None:
                        checks[number].pass_embedding()
                    if prompt is not None:
                        yield number, Step("guardrail", 0, 1)
                        checks[number].prompt(prompt)
            except GuardrailRefusal as error:
                refusals[number] = error
            else:
                live.append(number)
        most = self._at_once(len(plans))
        for at in range(0, len(live), most):
            group = live[at : at + most]
            # what all share so far is the reading; the rest is the group's own
            own = shared.followed_by(Recorder(self.device)) if len(live) > most else shared
            yield from self._draw(plans, group, own, checks, refusals)
        if not refusals:
            return
        first = next(iter(refusals.values()))
        if len(plans) == 1:
            raise first
        count = f"{len(refusals)} of {len(plans)} inputs were refused"
        stage = joined_stages(refusal.stage for refusal in refusals.values())
        raise GuardrailRefusal(f"{count}, the first so: {first}", stage, refusals)

    def _draw(
        self,
        plans: Sequence[_Plan],
        group: Sequence[int],
        shared: Recorder,
        checks: Sequence[Checks],
        refusals: dict[int, GuardrailRefusal],
    ) -> Iterator[tuple[int, Step]]:
        """Continue the clips of a group, by their numbers; add what is refused to `refusals`."""
        jobs = [plans[number].job for number in group]
        for progress in continue_clips(self.parts, jobs, shared):
            number = group[progress.clip]
            if progress.kind != "done":
                step = Step(progress.kind, progress.done, progress.total, progress.frames)
                yield number, self._shown(step)
                continue
            assert progress.frames is not None
            job, source = plans[number].job, plans[number].source
            if checks[number].on:
                yield number, Step("guardrail", 0, 1)
            try:
                frames = checks[number].video(progress.frames)
            except GuardrailRefusal as error:
                refusals[number] = error
                continue
            recorder = shared if job.recorder is shared else shared.followed_by(job.recorder)
            report = self._report(job.request, recorder, source, progress.total, len(jobs))
            report |= checks[number].report()
            report["frames_sha256"] = frames_sha256(frames)
            video = Video(frames, FPS, report, job.request.prompt)
            done = Step("done", progress.total, progress.total, frames, video=video)
            yield number, done
            del frames, video, done  # or the frames of two clips would be held

    def _report(
        self,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
        drawn: int,
        at_once: int,
    ) -> dict[str, Any]:
        transformer, text = self.parts.transformer, self.parts.text
        spent = sum(s.seconds for s in recorder.stages if s.name in ("prefill", "tokens"))
        decoder = recorder.facts["decoder"]
        # a prompt has many queries; see `worldline.nn.attention` for the one query of a step
        steps = "matrix products" if decoder == PlainDecoder.name else "Triton, split keys"
        asked = dict(request.__dict__)
        if not self.video2world:
            del asked["prompt"]  # it has none, not even an empty one
        diffusion = self.parts.decoder
        settings = None
        if diffusion is not None:
            settings = asdict(decoder_settings(diffusion, request))
        return {
            "model": self.name,
            "parameters": self.parameters,
            **source,
            "request": asked,
            "decoder": decoder,
            "diffusion_decoder": settings,
            "attention": f"torch SDPA (prompt), {steps} (decoding)",
            "dtype": str(transformer.module.head.weight.dtype).removeprefix("torch."),
            "text_encoder_dtype": str(text.dtype).removeprefix("torch.") if text else None,
            TRUNCATION: recorder.facts.get(TRUNCATION, {}),
            "offload": {
                "ar_model": transformer.offload,
                "tokenizer": self.parts.tokenizer.offload,
                "diffusion_decoder": diffusion is not None and diffusion.transformer.offload,
                "text_encoder_model": text is not None and text.offload,
                **self.safety.offloading,
            },
            "tokens": drawn,
            "clips_at_once": at_once,  # that share the seconds of all stages but their decoding
            "tokens_per_second": round(at_once * drawn / spent, 2) if spent else None,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }
