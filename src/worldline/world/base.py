"""What worlds of all families have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from worldline.errors import InputError
from worldline.loading import AutoregressiveParts, DiffusionParts, FlowParts
from worldline.pipelines.step import Step, Video
from worldline.report import Recorder
from worldline.world.inputs import Input, InputType
from worldline.world.safety import Safety


class World:
    """A world model, ready to make videos. Made by `worldline.load`.

    Attributes:
        name: of its folder.
        parts: its networks.
        loading: seconds and memory that loading took.
        identity: name, size and time of every file that decides what it makes.
        safety: its guardrails.
    """

    parts: AutoregressiveParts | DiffusionParts | FlowParts

    def __init__(
        self,
        name: str,
        parts: AutoregressiveParts | DiffusionParts | FlowParts,
        loading: Recorder,
        identity: dict[str, Any],
        safety: Safety | None = None,
    ) -> None:
        self.name = name
        self.parts = parts
        self.loading = loading
        self.identity = identity
        self.safety = safety or Safety(why_off="none was loaded")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {str(self.device)!r})"

    @property
    def parameters(self) -> int:
        """Number of trained weights of the transformer."""
        return sum(weight.numel() for weight in self.parts.transformer.module.parameters())

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def generate(self, input: Input | None = None, **options: Any) -> Video:
        """Make a video, of an input or of a prompt; the options are those of `stream`."""
        for step in self.stream(input, **options):
            if step.video is not None:
                return step.video
        raise AssertionError("a stream ends with its video")

    def stream(
        self, input: Input | None = None, *, input_type: InputType | None = None, **options: Any
    ) -> Iterator[Step]:
        """Do what `generate` does, and yield a `Step` now and then; the last carries the video.

        Args:
            input: a file; a PIL image; or frames (T, H, W, 3) uint8, array or tensor. None where a
                diffusion world, or one of Predict2.5, makes a video from a prompt alone.
            input_type: "image" or "video"; by default what the input is.
            options: of an autoregressive world the fields of `AutoregressiveRequest`:
                num_input_frames (9; 1 for an image), num_video_frames, rollout, temperature, top_p,
                seed, decoder_seam, and of a Video2World model prompt or prompt_embeddings; frames
                are told as latent frames complete, unless a network is offloaded, and behind the
                diffusion decoder as its windows complete. Of a diffusion world those of
                `DiffusionRequest`: prompt, negative_prompt, num_input_frames (1), num_video_frames,
                height, width, fps, num_steps, guidance, seed, sampler, …, and prompt_embeddings and
                negative_prompt_embeddings, which take the place of prompts. Of a world of
                Predict2.5 those of `FlowRequest`, likewise: num_input_frames (1 for an image, 5 for
                a video), num_video_frames, height, width, guidance, num_steps, seed, chunk_size,
                chunk_overlap, …

        Raises:
            InputError: the input or an option is wrong; raised before anything runs.
            GuardrailRefusal: a guardrail refused the prompt, before anything was made, or the
                video. Where guardrails check videos, no frames are shown before that.
        """
        if input_type not in ("image", "video", None):
            raise InputError(f'input_type is {input_type!r}; it must be "image" or "video"')
        return self._begin(input, input_type, options)

    def _shown(self, step: Step) -> Step:
        """Return a step without the frames that no guardrail has seen yet."""
        return replace(step, frames=None, preview=None) if self.safety.checks_videos else step

    def _begin(
        self, input: Input | None, input_type: InputType | None, options: dict[str, Any]
    ) -> Iterator[Step]:
        """Check everything, then return the steps."""
        raise NotImplementedError
