"""Worlds that continue clips token by token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from worldline.errors import InputError
from worldline.loading import AutoregressiveParts
from worldline.models.predict1_ar.decoder import PlainDecoder
from worldline.pipelines.autoregressive import FPS, check_room, continue_clip
from worldline.pipelines.requests import AutoregressiveRequest
from worldline.report import Recorder, environment
from worldline.video.read import Clip
from worldline.world.base import World
from worldline.world.inputs import Input, InputType, describe, kind_of, read_clip, stamp_of
from worldline.world.video import Step, Video

logger = logging.getLogger(__name__)


class AutoregressiveWorld(World):
    """Continues an image or a video; takes no prompt."""

    parts: AutoregressiveParts

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
        found = kind_of(input)
        assert input is not None  # told by `kind_of`
        kind = input_type or found
        known = AutoregressiveRequest.__dataclass_fields__
        if unknown := ", ".join(sorted(options.keys() - known.keys())):
            raise InputError(f"unknown option {unknown}; there are: input_type, {', '.join(known)}")
        if kind == "image":
            if options.get("num_input_frames", 1) != 1:
                logger.info("num_input_frames has no effect: an image has 1 frame")
            options["num_input_frames"] = 1
        request = AutoregressiveRequest(**options)
        check_room(self.parts.config, self.parts.tokenizer.module.config, request.num_input_frames)
        recorder = Recorder(self.device)
        source = {"input": describe(input), "files": {**self.identity, "input": stamp_of(input)}}
        with recorder.stage("read"):
            clip = read_clip(input, kind, request.num_input_frames)
        return self._run(clip, request, recorder, source)

    def _run(
        self,
        clip: Clip,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
    ) -> Iterator[Step]:
        for progress in continue_clip(self.parts, clip, request, recorder):
            if progress.frames is None:
                yield Step(progress.kind, progress.done, progress.total)
                continue
            report = self._report(request, recorder, source, progress.total)
            video = Video(progress.frames, FPS, report)
            yield Step("done", progress.total, progress.total, progress.frames, video=video)

    def _report(
        self,
        request: AutoregressiveRequest,
        recorder: Recorder,
        source: dict[str, Any],
        drawn: int,
    ) -> dict[str, Any]:
        transformer = self.parts.transformer
        spent = sum(s.seconds for s in recorder.stages if s.name in ("prefill", "tokens"))
        decoder = recorder.facts["decoder"]
        # a prompt has many queries; see `worldline.nn.attention` for the one query of a step
        steps = "matrix products" if decoder == PlainDecoder.name else "Triton, split keys"
        return {
            "model": self.name,
            "parameters": self.parameters,
            **source,
            "request": request.__dict__,
            "decoder": decoder,
            "attention": f"torch SDPA (prompt), {steps} (decoding)",
            "dtype": str(transformer.module.head.weight.dtype).removeprefix("torch."),
            "offload": {
                "ar_model": transformer.offload,
                "tokenizer": self.parts.tokenizer.offload,
            },
            "tokens": drawn,
            "tokens_per_second": round(drawn / spent, 2) if spent else None,
            **environment(self.device),
            "load": self.loading.as_dict(),
            "run": recorder.as_dict(),
        }
