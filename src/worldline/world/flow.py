"""Worlds of Cosmos-Predict2.5, which carry noise to data along a flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from worldline.loading import FlowFiles, FlowParts, check_frames
from worldline.pipelines.denoise import Embeddings
from worldline.pipelines.predict2_5 import (
    check_request,
    check_text,
    count_steps,
    cut_windows,
    generate,
    make_request,
    notes,
    read_embeddings,
    window_of,
)
from worldline.pipelines.requests import FlowRequest
from worldline.pipelines.step import Step
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.video.read import Clip
from worldline.world.denoising import DenoisingWorld


class FlowWorld(DenoisingWorld):
    """Makes a video of a prompt, or continues an image or a video by one."""

    request_type = FlowRequest
    frames_given = (5, 5)
    parts: FlowParts

    @property
    def files(self) -> FlowFiles:
        """What the world was read from."""
        return self.parts.files

    def _make_request(self, options: Mapping[str, Any]) -> FlowRequest:
        return make_request(self.files, **options)

    def _check(self, request: FlowRequest, embeddings: Mapping[str, Any]) -> Embeddings:
        check_request(self.files, request)
        check_frames(request.video, guarded=self.safety.checks_videos)
        given = read_embeddings(*embeddings.values())
        check_text(self.files, request, given)
        return given

    def _notes(self, request: FlowRequest) -> list[str]:
        return notes(self.files, request)

    def _at_once(self, request: FlowRequest) -> VideoShape:
        return window_of(self.files, request)

    def _make(
        self,
        clip: Clip | None,
        request: FlowRequest,
        recorder: Recorder,
        embeddings: Embeddings,
    ) -> Iterator[Step]:
        return generate(self.parts, clip, request, recorder, embeddings)

    def _rules(self, request: FlowRequest, recorder: Recorder) -> dict[str, Any]:
        rules = self.files.rules
        return {
            "schedule": rules.schedule,
            "known_timestep": rules.known_timestep,
            "evaluations": count_steps(self.files, request),
            "chunks": len(cut_windows(self.files, request)),
        }

    def _offload(self) -> dict[str, bool]:
        parts = self.parts
        return {
            "diffusion_model": parts.transformer.offload,
            "tokenizer": parts.tokenizer.offload,
            "text_encoder": parts.text.offload if parts.text else False,
        }
