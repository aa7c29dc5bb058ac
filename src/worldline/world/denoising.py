"""What worlds that denoise latents have in common, whatever carries noise to data."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields
from statistics import median
from typing import Any, ClassVar

from worldline.errors import InputError
from worldline.loading import DiffusionParts, FlowParts
from worldline.nn.attention import backend_name
from worldline.pipelines.exchange import Embeddings, Progress
from worldline.pipelines.prompts import TRUNCATION
from worldline.pipelines.requests import VideoRequest
from worldline.report import Recorder, environment
from worldline.shapes import VideoShape
from worldline.video.read import Clip
from worldline.video.write import frames_sha256
from worldline.world.base import World
from worldline.world.inputs import Input, InputType, describe, kind_of, read_clip, stamp_of
from worldline.world.safety import Checks, Safety
from worldline.world.video import Step, Video

logger = logging.getLogger(__name__)

_EMBEDDINGS = ("prompt_embeddings", "negative_prompt_embeddings")


class DenoisingWorld(World):
    """Makes a video of a prompt, or continues an image or a video by one.

    Attributes:
        request_type: what it is asked by.
        frames_given: of an input that is a video, how many frames are continued unless a request
            says another number, and the most that is advised.
    """

    request_type: ClassVar[type[VideoRequest]]
    frames_given: ClassVar[tuple[int, int]]
    parts: DiffusionParts | FlowParts

    def __init__(
        self,
        name: str,
        parts: DiffusionParts | FlowParts,
        loading: Recorder,
        identity: dict[str, Any],
        safety: Safety | None = None,
    ) -> None:
        super().__init__(name, parts, loading, identity, safety)
        self._said: set[str] = set()

    @abstractmethod
    def _make_request(self, options: Mapping[str, Any]) -> Any:
        """Return the request, of `request_type`, with the world's own defaults."""

    @abstractmethod
    def _check(self, request: Any, embeddings: Mapping[str, Any]) -> Embeddings:
        """Refuse what the world cannot do; return the embeddings that are given, checked."""

    @abstractmethod
    def _notes(self, request: Any) -> list[str]:
        """Return what is worth saying of a request that is allowed."""

    def _prepare(
        self,
        clip: Clip | None,
        request: Any,
        recorder: Recorder,
        embeddings: Embeddings,
        checks: Checks,
    ) -> Generator[Step, None, Any]:
        """Have the prompt checked, before anything is made; return the request to make it by.

        Raises:
            GuardrailRefusal: the prompt is refused.
        """
        if checks.on and embeddings.prompt is not None:
            checks.pass_embedding()
        if checks.on and request.prompt is not None:
            yield Step("guardrail", 0, 1)
            checks.prompt(request.prompt)
        return request

    @abstractmethod
    def _make(
        self, clip: Clip | None, request: Any, recorder: Recorder, embeddings: Embeddings
    ) -> Iterator[Progress]:
        """Make the video."""

    @abstractmethod
    def _rules(self, request: Any, recorder: Recorder) -> dict[str, Any]:
        """Return what the report says of how the video was made, beside the request."""

    @abstractmethod
    def _offload(self) -> dict[str, bool]:
        """Return which parts wait in host memory."""

    def _at_once(self, request: Any) -> VideoShape:
        """Return the size of what is denoised at once."""
        shape: VideoShape = request.video
        return shape

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
        known = [field.name for field in fields(self.request_type)]
        if unknown := ", ".join(sorted(options.keys() - {*known, *_EMBEDDINGS})):
            raise InputError(
                f"unknown option {unknown}; there are: input_type, "
                f"{', '.join((*known, *_EMBEDDINGS))}"
            )
        given = {name: options.pop(name, None) for name in _EMBEDDINGS}
        kind = None if input is None else input_type or kind_of(input)
        of_kind = {None: 0, "image": 1, "video": self.frames_given[0]}
        options.setdefault("num_input_frames", of_kind[kind])
        request = self._make_request(options)
        self._check_input(kind, request.num_input_frames)
        embeddings = self._check(request, given)
        for note in self._notes(request):
            if note not in self._said:  # once for a batch
                logger.info("%s", note)
            self._said.add(note)
        recorder = Recorder(self.device)
        stamps = {"input": stamp_of(input), "prompt_embeddings": stamp_of(given[_EMBEDDINGS[0]])}
        if given[_EMBEDDINGS[1]] is not None:
            stamps[_EMBEDDINGS[1]] = stamp_of(given[_EMBEDDINGS[1]])
        source = {
            "input": None if input is None else describe(input),
            "files": {**self.identity, **stamps},
        }
        clip = None
        if input is not None and kind is not None:
            with recorder.stage("read"):
                clip = read_clip(input, kind, request.num_input_frames)
        return self._run(clip, request, recorder, source, embeddings)

    def _check_input(self, kind: InputType | None, num_input_frames: int) -> None:
        if kind is None and num_input_frames:
            raise InputError(f"num_input_frames is {num_input_frames}, but there is no input")
        if kind is not None and not num_input_frames:
            most = self.frames_given[1]
            raise InputError(f"num_input_frames is 0, but there is an input; give 1 or {most}")
        if kind == "image" and num_input_frames > 1:
            raise InputError(
                f"num_input_frames is {num_input_frames}, but an image has 1 frame; give 1, or a "
                "video"
            )

    def _run(
        self,
        clip: Clip | None,
        request: VideoRequest,
        recorder: Recorder,
        source: dict[str, Any],
        embeddings: Embeddings,
    ) -> Iterator[Step]:
        checks = self.safety.begin(recorder)
        made = yield from self._prepare(clip, request, recorder, embeddings, checks)
        seconds: list[float] = []
        for progress in self._make(clip, made, recorder, embeddings):
            kind, done, total = progress.kind, progress.done, progress.total
            if progress.seconds is not None:
                seconds.append(round(progress.seconds, 4))
            if kind != "done":
                yield self._shown(Step(kind, done, total, progress.frames, progress.preview))
                continue
            assert progress.frames is not None
            if checks.on:
                yield Step("guardrail", 0, 1)
            frames = checks.video(progress.frames)
            report = self._report(request, recorder, source, seconds)
            report |= {"prompt": made.prompt, **checks.report()}
            report["frames_sha256"] = frames_sha256(frames)
            video = Video(frames, request.fps, report, made.prompt)
            yield Step(kind, done, total, frames, video=video)

    def _report(
        self,
        request: VideoRequest,
        recorder: Recorder,
        source: dict[str, Any],
        seconds: list[float],
    ) -> dict[str, Any]:
        parts = self.parts
        config, dtype = parts.config, parts.transformer.module.dtype
        tokenizer = parts.files.tokenizer_config
        grid = self._at_once(request).latent(tokenizer.temporal, tokenizer.spatial)
        tokens = config.tokens(grid).tokens
        text = parts.text
        return {
            "model": self.name,
            "parameters": self.parameters,
            **source,
            "request": dict(request.__dict__),
            **self._rules(request, recorder),
            "tokens": tokens,
            "attention": backend_name(self.device, dtype, config.head_size, tokens),
            "dtype": str(dtype).removeprefix("torch."),
            "text_encoder_dtype": str(text.dtype).removeprefix("torch.") if text else None,
            TRUNCATION: recorder.facts.get(TRUNCATION, {}),
            "offload": {**self._offload(), **self.safety.offloading},
            "seconds_per_step": round(median(seconds), 4) if seconds else None,
            "seconds_of_steps": seconds,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }
