"""Worlds that continue clips token by token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from worldline.errors import InputError
from worldline.loading import AutoregressiveFiles, AutoregressiveParts
from worldline.models.predict1_ar.decoder import PlainDecoder
from worldline.pipelines.autoregressive import (
    FPS,
    AutoregressiveRequest,
    check_prompt,
    check_room,
    continue_clip,
    decoder_settings,
)
from worldline.pipelines.prompts import read_prompt_embedding
from worldline.report import Recorder, environment
from worldline.video.read import Clip
from worldline.world.base import World
from worldline.world.inputs import Input, InputType, describe, kind_of, read_clip, stamp_of
from worldline.world.video import Step, Video

logger = logging.getLogger(__name__)

_EMBEDDINGS = "prompt_embeddings"


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

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
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
        check_room(self.parts.config, self.parts.tokenizer.module.config, request.num_input_frames)
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
        recorder = Recorder(self.device)
        source = {"input": describe(input), "files": {**self.identity, **stamps}}
        with recorder.stage("read"):
            clip = read_clip(input, kind, request.num_input_frames)
        return self._run(clip, request, recorder, source, embedding)

    def _run(
        self,
        clip: Clip,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
        embedding: Tensor | None,
    ) -> Iterator[Step]:
        for progress in continue_clip(self.parts, clip, request, recorder, embedding):
            if progress.kind != "done":
                yield Step(progress.kind, progress.done, progress.total, progress.frames)
                continue
            assert progress.frames is not None
            report = self._report(request, recorder, source, progress.total)
            video = Video(progress.frames, FPS, report, request.prompt)
            yield Step("done", progress.total, progress.total, progress.frames, video=video)

    def _report(
        self,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
        drawn: int,
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
            "offload": {
                "ar_model": transformer.offload,
                "tokenizer": self.parts.tokenizer.offload,
                "diffusion_decoder": diffusion is not None and diffusion.transformer.offload,
                "text_encoder_model": text is not None and text.offload,
            },
            "tokens": drawn,
            "tokens_per_second": round(drawn / spent, 2) if spent else None,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }
