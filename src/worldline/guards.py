"""Guardrails and prompt upsampler around a request."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldline.errors import CheckpointError
from worldline.family import Compute, Opened
from worldline.files import GIGABYTE, find_repository
from worldline.parallel.offload import Part
from worldline.report import Recorder
from worldline.request import Request
from worldline.step import Step
from worldline.video.read import Clip

if TYPE_CHECKING:
    from worldline.guardrails.base import Guardrails
    from worldline.text.upsampler import Upsampler

logger = logging.getLogger(__name__)

_LICENCE = (
    "the guardrails are off: by the NVIDIA Open Model License, the rights to the released weights "
    "end where a guardrail is bypassed without a similar one that fits the use"
)


_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


@dataclass(frozen=True)
class PromptUpsampler:
    """A prompt upsampler on its device, or waiting in host memory."""

    upsampler: Upsampler
    part: Part[Any]

    @property
    def name(self) -> str:
        return self.upsampler.name

    @property
    def offload(self) -> bool:
        return self.part.offload

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.part.module.parameters())

    def write(self, request: Request, clip: Clip | None) -> str:
        """The prompt to use in place of a request's; a clip without one is described."""
        frame = None if clip is None else clip.frames[-1]
        with self.part.on_device():
            return self.upsampler.write(request.prompt, frame, request.seed)


@dataclass(frozen=True)
class Guards:
    """What runs around the requests of one model.

    Attributes:
        opened: the model.
        loading: seconds and memory that loading took.
        guardrails: None where none run.
        release: name of their set; None where none run.
        guardrail_off: why none run; None where they do.
        upsampler: None where prompts are used as they are.
    """

    opened: Opened
    loading: Recorder
    guardrails: Guardrails | None = None
    release: str | None = None
    guardrail_off: str | None = None
    upsampler: PromptUpsampler | None = None

    @property
    def checks_videos(self) -> bool:
        """Whether frames must not leave before the whole video was checked."""
        return self.guardrails is not None and bool(self.guardrails.video)

    @property
    def guardrail_bytes(self) -> int:
        """Bytes of the largest offloaded guardrail, which come to the device when it is used."""
        return self.guardrails.offloaded_bytes if self.guardrails else 0

    @property
    def advice(self) -> str:
        """End of a message about exhausted memory: which flags free how much."""
        found = []
        if self.guardrails is not None and not self.guardrails.offload:
            nbytes = self.guardrails.resident_bytes
            found.append(f"--offload_guardrail_models frees {nbytes / GIGABYTE:.1f} GB")
        if self.upsampler is not None and not self.upsampler.offload:
            nbytes = self.upsampler.nbytes
            found.append(f"--offload_prompt_upsampler frees {nbytes / GIGABYTE:.1f} GB")
        return "".join(f"; {each}" for each in found)

    @property
    def offloaded(self) -> dict[str, bool]:
        """What runs around the model, and whether it waits in host memory."""
        found = {}
        if self.guardrails is not None:
            found["guardrail_models"] = self.guardrails.offload
        if self.upsampler is not None:
            found["prompt_upsampler"] = self.upsampler.offload
        return found

    def begin(self, recorder: Recorder) -> Checks:
        """The checks of one request, with a report of their own."""
        return Checks(self, self.guardrails and self.guardrails.for_request(), recorder)


@dataclass
class Checks:
    """The guards of one request."""

    guards: Guards
    guardrails: Guardrails | None
    recorder: Recorder
    upsampled: bool = False

    def before(self, request: Request, clip: Clip | None) -> Generator[Step, None, Request]:
        """Check the prompt, rewrite it, check it again; return the request to make.

        Raises:
            GuardrailRefusal: the prompt is refused.
        """
        if self.guardrails is not None and request.prompt_embeddings is not None:
            logger.warning("no guardrail checks the prompt: its embedding is given")
        if request.prompt is not None:
            yield from self._check_prompt(request.prompt, "prompt")
        upsampler = self.guards.upsampler
        if upsampler is None or not rewrites(self.guards.opened, request):
            return request
        yield Step("upsample", 0, 1)
        with self.recorder.stage("upsample"):
            prompt = upsampler.write(request, clip)
        self.upsampled = True
        yield from self._check_prompt(prompt, "upsampled prompt")
        return request.model_copy(update={"prompt": prompt})

    def _check_prompt(self, prompt: str, subject: str) -> Generator[Step, None, None]:
        if self.guardrails is None or not self.guardrails.text:
            return
        yield Step("guardrail", 0, 1)
        with self.recorder.stage("guardrail"):
            self.guardrails.check_prompt(prompt, subject)

    def after(self, frames: NDArray[np.uint8]) -> Generator[Step, None, NDArray[np.uint8]]:
        """Check a video; return it with faces blurred.

        Raises:
            GuardrailRefusal: the video is refused.
        """
        if self.guardrails is None:
            return frames
        yield Step("guardrail", 0, 1)
        with self.recorder.stage("guardrail"):
            return self.guardrails.check_video(frames)

    def report(self) -> dict[str, Any]:
        guards = self.guards
        return {
            "guardrail": guards.release,
            "guardrail_off": guards.guardrail_off,
            "guardrail_checks": self.guardrails.checks if self.guardrails else [],
            "prompt_upsampler": guards.upsampler.name if guards.upsampler else None,
            "prompt_upsampler_ran": self.upsampled,
        }


def release_of(opened: Opened) -> str | None:
    """Name of the set of guardrails that a model runs with; None if there is none.

    Released models run with theirs unless disabled; bundled ones have none unless insisted on.
    """
    disabled = opened.options.disable_guardrail
    off = opened.place.bundled if disabled is None else disabled
    return None if off else opened.family.guardrails(opened)


def upsamples(opened: Opened) -> bool:
    """Whether a prompt upsampler belongs to a model and is not disabled."""
    if opened.family.upsampler is None:
        return False
    disabled = opened.options.disable_prompt_upsampler
    return not (opened.place.bundled if disabled is None else disabled)


def rewrites(opened: Opened, request: Any) -> bool:
    """Whether the prompt upsampler writes the prompt of a request."""
    if opened.family.upsampler is None or not upsamples(opened):
        return False
    if request.prompt_embeddings is not None:
        return False
    describes, _ = opened.family.upsampler(opened)
    if describes:  # a prompt beside a clip is used, which the released code ignores
        return request.prompt is None and request.num_input_frames > 0
    limit = opened.options.word_limit_to_skip_upsampler
    return request.prompt is not None and len(request.prompt.split()) <= limit


def load_guards(opened: Opened, compute: Compute, *, upsample: bool = True) -> Guards:
    """Load guardrails and prompt upsampler; before the model, so that nothing runs without them.

    Args:
        opened: the model.
        compute: its device is theirs.
        upsample: whether any prompt will be rewritten.

    Raises:
        CheckpointError: one is absent or damaged; all that are, and the flags to run without.
    """
    recorder = Recorder(compute.device)
    problems: list[str] = []
    guardrails = upsampler = None
    release = release_of(opened)
    if release is None:
        disabled = opened.options.disable_guardrail
        why = "disabled by the user" if disabled else "bundled models have none"
        logger.info(
            "%s", _LICENCE if disabled and not opened.place.bundled else f"no guardrail: {why}"
        )
    else:
        try:
            with recorder.stage("load guardrails"):
                guardrails = _load_guardrails(opened, compute, release)
        except CheckpointError as error:
            problems.append(str(error))
    if upsample and upsamples(opened):
        try:
            with recorder.stage("load prompt upsampler"):
                upsampler = _load_upsampler(opened, compute)
        except (CheckpointError, OSError, ImportError) as error:
            flag = "disable_prompt_upsampler"
            problems.append(
                f"the prompt upsampler cannot load: {error}; `worldline checkpoints download "
                f"{opened.folder.name}` fetches it, --{flag} (in Python {flag}=True) runs without"
            )
    if problems:
        raise CheckpointError("; and ".join(problems))
    return Guards(opened, recorder, guardrails, release, None if release else why, upsampler)


def _load_guardrails(opened: Opened, compute: Compute, release: str) -> Guardrails:
    from worldline import guardrails as sets  # imported only where guardrails run

    options = opened.options
    flag = options.field_flag("disable_guardrail")
    guardrails = sets.load(
        release,
        opened.place.roots,
        flag=f"--{flag} (in Python {flag}=True)",
        folder=None if options.guardrail_dir is None else Path(options.guardrail_dir),
        device=compute.device,
        offload=options.offload_guardrail_models,
        text="text" in opened.parts or "text" in opened.missing,
    )
    logger.info("guardrails: %s", ", ".join(guardrails.parts))
    return guardrails


def _load_upsampler(opened: Opened, compute: Compute) -> PromptUpsampler:
    from worldline.text.upsampler import PIXTRAL, load_upsampler

    place, options = opened.place, opened.options
    assert opened.family.upsampler is not None
    describes, names = opened.family.upsampler(opened)
    if options.prompt_upsampler_dir is not None:
        folder = place.chosen(options.prompt_upsampler_dir, "prompt_upsampler_dir")
    elif (found := place.below(names)) is not None:
        folder = found
    else:
        raise CheckpointError(f"neither {' nor '.join(names)} is in {place.searched}")
    tokenizer = None
    if describes and not any(
        (folder / name).is_file() for name in _TOKENIZERS
    ):  # the released conversion has none
        tokenizer = find_repository(PIXTRAL, place.roots)
    offload = options.offload_prompt_upsampler
    logger.info("reading %s", folder)
    upsampler = load_upsampler(
        folder,
        describes=describes,
        device="cpu" if offload else compute.device,
        tokenizer_folder=tokenizer,
    )
    return PromptUpsampler(upsampler, Part(upsampler.network, compute.device, offload=offload))
