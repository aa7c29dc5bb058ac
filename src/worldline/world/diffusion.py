"""Worlds that denoise latents, from a prompt, an image or a clip."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from statistics import median
from typing import Any

from worldline.errors import InputError
from worldline.loading import DiffusionFiles, DiffusionParts
from worldline.nn.attention import backend_name
from worldline.pipelines.diffusion import (
    Embeddings,
    check_request,
    check_text,
    generate,
    make_request,
    notes,
    read_embeddings,
    rotary_precision_of,
    sampler_of,
)
from worldline.pipelines.requests import DiffusionRequest
from worldline.report import Recorder, environment
from worldline.video.read import Clip
from worldline.world.base import World
from worldline.world.inputs import Input, InputType, describe, kind_of, read_clip, stamp_of
from worldline.world.safety import Safety
from worldline.world.upsampling import Upsampling
from worldline.world.video import Step, Video

logger = logging.getLogger(__name__)

_EMBEDDINGS = ("prompt_embeddings", "negative_prompt_embeddings")


class DiffusionWorld(World):
    """Makes a video of a prompt, or continues an image or a video by one."""

    parts: DiffusionParts

    def __init__(
        self,
        name: str,
        parts: DiffusionParts,
        loading: Recorder,
        identity: dict[str, Any],
        safety: Safety | None = None,
        upsampling: Upsampling | None = None,
    ) -> None:
        super().__init__(name, parts, loading, identity, safety)
        self.upsampling = upsampling or Upsampling(why_off="none was loaded")
        self._said: set[str] = set()

    @property
    def files(self) -> DiffusionFiles:
        """What the world was read from."""
        return self.parts.files

    @property
    def text2world(self) -> bool:
        """Whether it makes videos from a prompt alone."""
        return self.files.defaults.text2world

    @property
    def video2world(self) -> bool:
        """Whether it continues images and videos."""
        return self.files.config.condition_mask

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
        known = [field.name for field in fields(DiffusionRequest)]
        if unknown := ", ".join(sorted(options.keys() - {*known, *_EMBEDDINGS})):
            raise InputError(
                f"unknown option {unknown}; there are: input_type, "
                f"{', '.join((*known, *_EMBEDDINGS))}"
            )
        given = {name: options.pop(name, None) for name in _EMBEDDINGS}
        kind = None if input is None else input_type or kind_of(input)
        options.setdefault("num_input_frames", 0 if kind is None else 1)
        request = make_request(self.files.defaults, **options)
        _check_input(kind, request.num_input_frames)
        check_request(self.files, request)
        embeddings = read_embeddings(self.files, *given.values())
        embedded = embeddings.prompt is not None
        written = self.upsampling.applies(request.prompt, embedded=embedded)
        # one that will be written stands in for none
        stand_in = replace(request, prompt="…") if written else request
        check_text(self.files, stand_in, embeddings)
        for note in notes(self.files, request):
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
        return self._run(clip, request, recorder, source, embeddings, written)

    def _run(
        self,
        clip: Clip | None,
        request: DiffusionRequest,
        recorder: Recorder,
        source: dict[str, Any],
        embeddings: Embeddings,
        written: bool,
    ) -> Iterator[Step]:
        checks = self.safety.begin(recorder)
        prompt = request.prompt
        if checks.on and prompt is None and not written:
            logger.warning("no guardrail checks the prompt: its embedding is given")
        if checks.on and prompt is not None:
            yield Step("guardrail", 0, 1)
            checks.prompt(prompt)
        if written:
            yield Step("upsample", 0, 1)
            prompt = self.upsampling.write(prompt, clip, request.seed, recorder)
            if checks.on:
                yield Step("guardrail", 0, 1)
                checks.prompt(prompt, "upsampled prompt")

        seconds: list[float] = []
        made = replace(request, prompt=prompt)
        for progress in generate(self.parts, clip, made, recorder, embeddings):
            if progress.seconds is not None:
                seconds.append(round(progress.seconds, 4))
            if progress.kind != "done":
                yield self._shown(
                    Step(
                        progress.kind,
                        progress.done,
                        progress.total,
                        progress.frames,
                        progress.preview,
                    )
                )
                continue
            assert progress.frames is not None
            if checks.on:
                yield Step("guardrail", 0, 1)
            frames = checks.video(progress.frames)
            report = self._report(request, recorder, source, seconds)
            report |= {
                "prompt": prompt,
                "prompt_upsampler": self._upsampler_name,
                "prompt_upsampler_ran": written,
                **checks.report(),
            }
            video = Video(frames, request.fps, report, prompt)
            yield Step("done", progress.done, progress.total, frames, video=video)

    @property
    def _upsampler_name(self) -> str | None:
        upsampler = self.upsampling.upsampler
        return None if upsampler is None else upsampler.name

    def _report(
        self,
        request: DiffusionRequest,
        recorder: Recorder,
        source: dict[str, Any],
        seconds: list[float],
    ) -> dict[str, Any]:
        parts, files = self.parts, self.files
        config, dtype = parts.config, parts.transformer.module.dtype
        tokenizer = files.tokenizer_config
        tokens = config.tokens(request.video.latent(tokenizer.temporal, tokenizer.spatial)).tokens
        text = parts.text
        return {
            "model": self.name,
            "parameters": self.parameters,
            "generation": files.generation,
            **source,
            "request": dict(request.__dict__),
            "sampler": sampler_of(files, request),
            "rotary_precision": rotary_precision_of(files, request),
            "tokens": tokens,
            "attention": backend_name(self.device, dtype, config.head_size, tokens),
            "dtype": str(dtype).removeprefix("torch."),
            "text_encoder_dtype": str(text.dtype).removeprefix("torch.") if text else None,
            "offload": {
                "diffusion_transformer": parts.transformer.offload,
                "tokenizer": parts.tokenizer.offload,
                "text_encoder_model": text.offload if text else False,
                **self.upsampling.offloading,
                **self.safety.offloading,
            },
            "seconds_per_step": round(median(seconds), 4) if seconds else None,
            "seconds_of_steps": seconds,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }


def _check_input(kind: InputType | None, num_input_frames: int) -> None:
    if kind is None and num_input_frames:
        raise InputError(f"num_input_frames is {num_input_frames}, but there is no input")
    if kind is not None and not num_input_frames:
        raise InputError("num_input_frames is 0, but there is an input; give 1 or 9")
    if kind == "image" and num_input_frames > 1:
        raise InputError(
            f"num_input_frames is {num_input_frames}, but an image has 1 frame; give 1, or a video"
        )
