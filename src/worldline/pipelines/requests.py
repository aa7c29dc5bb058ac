"""What is asked of a world, checked as far as no world is needed for it; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from worldline.choices import (
    INPUT_FRAMES,
    MAX_SEED,
    NEGATIVE_PROMPT,
    ROLLOUTS,
    ROTARY_PRECISIONS,
    SAMPLERS,
    SEAMS,
    Reinsertion,
    Rollout,
    Seam,
)
from worldline.errors import InputError
from worldline.pipelines.numbers import real_number, whole_number
from worldline.shapes import VideoShape

ALLOWED_FPS = (1, 240)  # a video file can store them
LARGEST_GUIDANCE = 100
LARGEST_STEPS = 1000
LARGEST_SIZE = 1 << 20  # of frames and sides; what a world makes is its own matter


@dataclass(frozen=True, kw_only=True)
class AutoregressiveRequest:
    """One clip to continue.

    Attributes:
        num_input_frames: how many of the input's last frames are given to the model, 9 or 1.
        temperature: divides the logits; 0 takes the most likely token every time.
        top_p: mass of the likely tokens that may be drawn, in (0, 1].
        seed: of the draws, and of the diffusion decoder's noise, 0 to 2^32 - 1.
        prompt: what the video shows; Video2World models alone, None where its embedding is given.
        decoder_seam: how the diffusion decoder joins the windows of a clip of more than 57 frames;
            "as_released" repeats a fault of the released code, see `worldline.pipelines.decoder`.
        num_video_frames: 1 + 8k, the given ones included; the model's own or more. None is the
            model's own.
        rollout: how a longer video goes on: "tokens" draws on behind the last ones, while the
            oldest latent frame leaves the window; "pixels" encodes the last frames again as the
            beginning of a new window.
    """

    num_input_frames: int = 9
    temperature: float = 1.0
    top_p: float = 0.8
    seed: int = 0
    prompt: str | None = None
    decoder_seam: Seam = "corrected"
    num_video_frames: int | None = None
    rollout: Rollout = "tokens"

    def __post_init__(self) -> None:
        whole = ["num_input_frames", "seed"]
        if self.num_video_frames is not None:
            whole.append("num_video_frames")
        for name in whole:
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if self.num_input_frames not in INPUT_FRAMES:
            raise InputError(f"num_input_frames is {self.num_input_frames}; it must be 1 or 9")
        frames = self.num_video_frames
        if frames is not None and not 1 <= frames <= LARGEST_SIZE:
            raise InputError(f"num_video_frames is {frames}; it must be 1 to {LARGEST_SIZE}")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise InputError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed is {self.seed}; it must be 0 to {MAX_SEED}")
        _check_words(self.prompt, "prompt")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("the prompt is empty")
        for name, known in (("decoder_seam", SEAMS), ("rollout", ROLLOUTS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """One video to make: what all diffusion families ask for.

    Attributes:
        prompt: what it shows; may be None where its embedding is given.
        negative_prompt: what it does not show; None or empty for none.
        num_steps: evaluations of the denoiser.
        guidance: how far to go from the negative prompt towards the prompt and beyond; 0 is the
            prompt alone.
        num_video_frames: the given ones included.
        height: of a released world, a multiple of 16.
        width: likewise.
        fps: frames a second of the file, 1 to 240.
        seed: of the noise, 0 to 2^32 - 1.
        num_input_frames: how many of the input's last frames are continued; 0 for none.
        preview_every: steps between early looks; 0 for none.
    """

    prompt: str | None
    negative_prompt: str | None = NEGATIVE_PROMPT
    num_steps: int = 35
    guidance: float = 7.0
    num_video_frames: int
    height: int = 704
    width: int = 1280
    fps: float
    seed: int
    num_input_frames: int = 0
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_words(getattr(self, name), name)
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("the prompt is empty")
        whole = ("num_steps", "num_video_frames", "height", "width", "seed", "num_input_frames")
        for name in (*whole, "preview_every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("guidance", "fps"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        self._check_range("num_steps", 1, LARGEST_STEPS)
        self._check_range("guidance", 0, LARGEST_GUIDANCE)
        self._check_range("seed", 0, MAX_SEED)
        self._check_range("preview_every", 0, LARGEST_STEPS)
        for name in ("num_video_frames", "height", "width"):
            self._check_range(name, 1, LARGEST_SIZE)
        self._check_range("fps", *ALLOWED_FPS)

    def _check_range(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise InputError(f"{name} is {value}; it must be {least} to {most}")

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in choices:
            known = ", ".join(choice for choice in choices if choice)
            raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {known}")

    @property
    def video(self) -> VideoShape:
        return VideoShape(self.num_video_frames, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class DiffusionRequest(VideoRequest):
    """One video of Cosmos 1.0 or Predict1; see `VideoRequest` for what is not said here.

    Attributes:
        num_video_frames: 1 + 8k for a released world.
        fps: of the motion, too.
        num_input_frames: 0, 1 or 9.
        sampler: None is that of the model's generation.
        reinsertion: of the given frames; "march_2025" repeats a fault of the first release.
        augment_sigma: noise level that the given frames are shown with.
        rotary_precision: of the angles of position; None is the world's own, "bfloat16" for the
            released ones, as in their code.
    """

    num_video_frames: int = 121
    fps: float = 24.0
    seed: int = 1
    sampler: str | None = None
    reinsertion: Reinsertion = "corrected"
    augment_sigma: float = 0.001
    rotary_precision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment_sigma", real_number("augment_sigma", self.augment_sigma))
        super().__post_init__()
        if not 0 <= self.augment_sigma < math.inf:
            raise InputError(f"augment_sigma is {self.augment_sigma}; it must be 0 or more")
        if self.num_input_frames not in (0, *INPUT_FRAMES):
            raise InputError(f"num_input_frames is {self.num_input_frames}; it must be 1 or 9")
        self._check_choice("sampler", (None, *SAMPLERS))
        self._check_choice("reinsertion", get_args(Reinsertion))
        self._check_choice("rotary_precision", (None, *ROTARY_PRECISIONS))


@dataclass(frozen=True, kw_only=True)
class FlowRequest(VideoRequest):
    """One video of Predict2.5; see `VideoRequest` for what is not said here.

    Attributes:
        guidance: v + guidance (v - u) of the velocities with the prompt and without: one less than
            in the more usual form.
        num_video_frames: 1 + 4k.
        fps: the network is not told it.
        num_input_frames: 0, or 1 + 4k: 1 of an image, 5 of a video in the released settings.
        chunk_size: frames that are kept of each chunk of a long video, which may have any number of
            frames; None makes no long video.
        chunk_overlap: frames that a chunk of a long video is given of the one before, 1 + 4k; 1
            where none is made.
    """

    num_video_frames: int = 93
    fps: float = 16.0
    seed: int = 1
    chunk_size: int | None = None
    chunk_overlap: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.num_input_frames
        if given < 0 or (given and (given - 1) % 4):
            raise InputError(f"num_input_frames is {given}; it must be 0 or 1 + 4k, such as 1 or 5")
        if self.chunk_size is None:
            if self.chunk_overlap != 1:
                raise InputError(
                    f"chunk_overlap is {self.chunk_overlap}, but without a chunk_size no long "
                    "video is made, and it has no effect"
                )
            return
        for name in ("chunk_size", "chunk_overlap"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
            self._check_range(name, 1, LARGEST_SIZE)
        overlap = self.chunk_overlap
        if (overlap - 1) % 4:
            nearest = max(1, 1 + 4 * round((overlap - 1) / 4))
            raise InputError(
                f"chunk_overlap is {overlap}; it counts frames and must be 1 + 4k: the nearest is "
                f"{nearest}"
            )
        if self.chunk_size <= max(overlap, given):
            raise InputError(
                f"chunk_size is {self.chunk_size}, but {max(overlap, given)} frames of a chunk are "
                "given: nothing is left to make"
            )


def _check_words(prompt: object, name: str) -> None:
    """Refuse a prompt that is no text, or that cannot be written down."""
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{name} is a {type(prompt).__name__}; it must be text")
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is no valid text: {error}") from None
