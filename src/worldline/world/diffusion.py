"""Worlds that denoise latents, from a prompt, an image or a clip: Cosmos 1.0 and Predict1."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from worldline.loading import DiffusionFiles, DiffusionParts
from worldline.pipelines.denoise import Embeddings
from worldline.pipelines.diffusion import (
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
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.video.read import Clip
from worldline.world.denoising import DenoisingWorld
from worldline.world.safety import Checks, Safety
from worldline.world.upsampling import UPSAMPLE, Upsampling


class DiffusionWorld(DenoisingWorld):
    """Makes a video of a prompt, or continues an image or a video by one."""

    request_type = DiffusionRequest
    frames_given = (1, 9)
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

    def _make_request(self, options: Mapping[str, Any]) -> DiffusionRequest:
        return make_request(self.files.defaults, **options)

    def _check(self, request: DiffusionRequest, embeddings: Mapping[str, Any]) -> Embeddings:
        check_request(self.files, request)
        given = read_embeddings(self.files, *embeddings.values())
        # a prompt that will be written stands in for none
        known = replace(request, prompt="…") if self._writes(request, given) else request
        check_text(self.files, known, given)
        return given

    def _writes(self, request: DiffusionRequest, embeddings: Embeddings) -> bool:
        """Tell whether the upsampler writes the prompt of a request."""
        return self.upsampling.applies(request.prompt, embedded=embeddings.prompt is not None)

    def _notes(self, request: DiffusionRequest) -> list[str]:
        return notes(self.files, request)

    def _prepare(
        self,
        clip: Clip | None,
        request: DiffusionRequest,
        recorder: Recorder,
        embeddings: Embeddings,
        checks: Checks,
    ) -> Generator[Step, None, DiffusionRequest]:
        if not self._writes(request, embeddings):
            return (yield from super()._prepare(clip, request, recorder, embeddings, checks))
        if request.prompt is not None:
            yield from super()._prepare(clip, request, recorder, embeddings, checks)
        yield Step(UPSAMPLE, 0, 1)
        prompt = self.upsampling.write(request.prompt, clip, request.seed, recorder)
        if checks.on:
            yield Step("guardrail", 0, 1)
            checks.prompt(prompt, "upsampled prompt")
        return replace(request, prompt=prompt)

    def _make(
        self,
        clip: Clip | None,
        request: DiffusionRequest,
        recorder: Recorder,
        embeddings: Embeddings,
    ) -> Iterator[Step]:
        return generate(self.parts, clip, request, recorder, embeddings)

    def _rules(self, request: DiffusionRequest, recorder: Recorder) -> dict[str, Any]:
        upsampler = self.upsampling.upsampler
        return {
            "generation": self.files.generation,
            "sampler": sampler_of(self.files, request),
            "rotary_precision": rotary_precision_of(self.files, request),
            "prompt_upsampler": None if upsampler is None else upsampler.name,
            "prompt_upsampler_ran": any(stage.name == UPSAMPLE for stage in recorder.stages),
        }

    def _offload(self) -> dict[str, bool]:
        parts = self.parts
        return {
            "diffusion_transformer": parts.transformer.offload,
            "tokenizer": parts.tokenizer.offload,
            "text_encoder_model": parts.text.offload if parts.text else False,
            **self.upsampling.offloading,
        }
