"""Worlds that denoise latents, from a prompt, an image or a clip: Cosmos 1.0 and Predict1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from worldline.loading import DiffusionFiles, DiffusionParts
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
from worldline.pipelines.exchange import Embeddings, Progress
from worldline.pipelines.requests import DiffusionRequest
from worldline.report import Recorder
from worldline.video.read import Clip
from worldline.world.denoising import DenoisingWorld


class DiffusionWorld(DenoisingWorld):
    """Makes a video of a prompt, or continues an image or a video by one."""

    request_type = DiffusionRequest
    frames_given = (1, 9)
    parts: DiffusionParts

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
        check_text(self.files, request, given)
        return given

    def _notes(self, request: DiffusionRequest) -> list[str]:
        return notes(self.files, request)

    def _make(
        self,
        clip: Clip | None,
        request: DiffusionRequest,
        recorder: Recorder,
        embeddings: Embeddings,
    ) -> Iterator[Progress]:
        return generate(self.parts, clip, request, recorder, embeddings)

    def _rules(self, request: DiffusionRequest) -> dict[str, Any]:
        return {
            "generation": self.files.generation,
            "sampler": sampler_of(self.files, request),
            "rotary_precision": rotary_precision_of(self.files, request),
        }

    def _offload(self) -> dict[str, bool]:
        parts = self.parts
        return {
            "diffusion_transformer": parts.transformer.offload,
            "tokenizer": parts.tokenizer.offload,
            "text_encoder_model": parts.text.offload if parts.text else False,
        }
