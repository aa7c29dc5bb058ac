"""Which guardrails a world has, and what they said of a request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldline import guardrails
from worldline.guardrails.base import Guardrails
from worldline.loading import AutoregressiveFiles, FlowFiles, WorldFiles
from worldline.loading.diffusion import generation_of
from worldline.report import Recorder

logger = logging.getLogger(__name__)

BUNDLED = "bundled worlds have none"
DISABLED = "disabled by the user"
_FLOW_RELEASE = "predict2.5"


class Safety:
    """The guardrails of a world.

    Attributes:
        guardrails: None where none run.
        release: whose chain they are; None where none run.
        why_off: why none run; None where they do.
        loading: seconds and memory that loading took, of the prompt upsampler too.
    """

    def __init__(
        self,
        guardrails: Guardrails | None = None,
        release: str | None = None,
        why_off: str | None = None,
        loading: Recorder | None = None,
    ) -> None:
        self.loading = loading
        self.guardrails = guardrails
        self.release = release
        self.why_off = why_off

    @property
    def checks_videos(self) -> bool:
        """Whether frames must not be shown before the whole video was checked."""
        return self.guardrails is not None and bool(self.guardrails.video)

    @property
    def offload(self) -> bool:
        """Whether their networks wait in host memory."""
        return self.guardrails is not None and self.guardrails.offload

    @property
    def offloading(self) -> dict[str, bool]:
        """What a report says of it; nothing where none run."""
        return {} if self.guardrails is None else {"guardrail_models": self.offload}

    @property
    def nbytes(self) -> int:
        """Bytes that their networks hold on a GPU all the time."""
        return self.guardrails.resident_bytes if self.guardrails is not None else 0

    @property
    def visitor_bytes(self) -> int:
        """Bytes of the largest guard that waits in host memory, as it comes to the device."""
        return self.guardrails.offloaded_bytes if self.guardrails is not None else 0

    def begin(self, recorder: Recorder) -> Checks:
        """Return what checks one request, which `recorder` is told of."""
        own = None if self.guardrails is None else self.guardrails.for_request()
        return Checks(self, own, recorder)


class Checks:
    """What the guardrails say of one request."""

    def __init__(self, safety: Safety, guardrails: Guardrails | None, recorder: Recorder) -> None:
        self.safety = safety
        self.guardrails = guardrails
        self.recorder = recorder

    @property
    def on(self) -> bool:
        return self.guardrails is not None

    def prompt(self, text: str, subject: str = "prompt") -> None:
        """Check a prompt.

        Raises:
            GuardrailRefusal: it is refused.
        """
        if self.guardrails is not None:
            with self.recorder.stage("guardrail"):
                self.guardrails.check_prompt(text, subject)

    def pass_embedding(self) -> None:
        """Say that an embedding decides what is made, whatever the words beside it are."""
        logger.warning("no guardrail checks the prompt: its embedding is given")

    def video(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Check a video; return it with faces blurred.

        Raises:
            GuardrailRefusal: it is refused.
        """
        if self.guardrails is None:
            return frames
        with self.recorder.stage("guardrail"):
            return self.guardrails.check_video(frames)

    def report(self) -> dict[str, Any]:
        """Return what ran and what it said, for a run's JSON."""
        return {
            "guardrail": self.safety.release,
            "guardrail_off": self.safety.why_off,
            "guardrail_checks": [] if self.guardrails is None else self.guardrails.checks,
        }


def guardrail_release(files: WorldFiles, disable: bool | None) -> str | None:
    """Return whose guardrails a world runs with; None for none.

    Args:
        files: of the world.
        disable: True does without, False insists, None is as released: bundled worlds have none.
    """
    if files.bundled if disable is None else disable:
        return None
    if isinstance(files, FlowFiles):
        return _FLOW_RELEASE
    if isinstance(files, AutoregressiveFiles):
        return generation_of(files.folder, None)
    return files.generation


def load_safety(
    files: WorldFiles,
    checkpoint_dir: str | Path,
    disable: bool | None,
    *,
    guardrail_dir: str | Path | None,
    recorder: Recorder,
    offload: bool,
) -> Safety:
    """Load the guardrails of a world; before its own weights, so that nothing runs without them.

    Args:
        files: of the world.
        checkpoint_dir: holds the folders.
        disable: of `guardrail_release`.
        guardrail_dir: the folder of `blocklist` and others, if it is none of the released places.
        recorder: of the device where the networks run; is told seconds and memory.
        offload: keep them in host memory while they do not look.

    Raises:
        CheckpointError: one cannot load; its file, the flag that does without and the command that
            fetches it are named.
    """
    release = guardrail_release(files, disable)
    if release is None:
        if disable is None:
            logger.info("no guardrail checks prompt or video: %s", BUNDLED)
            return Safety(why_off=BUNDLED, loading=recorder)
        if not files.bundled:
            logger.info(
                "the guardrails are off: by the NVIDIA Open Model License, the rights to the "
                "released weights end where a guardrail is bypassed without a similar one that "
                "fits the use"
            )
        return Safety(why_off=DISABLED, loading=recorder)
    takes_prompts = not isinstance(files, AutoregressiveFiles) or (
        files.config.context_width is not None
    )
    flag = "disable_guardrails" if isinstance(files, FlowFiles) else "disable_guardrail"
    with recorder.stage("load guardrails"):
        loaded = guardrails.load(
            release,
            (Path(checkpoint_dir), files.folder.parent),
            flag=f"--{flag} (in Python {flag}=True)",
            folder=None if guardrail_dir is None else Path(guardrail_dir),
            device=recorder.device,
            text=takes_prompts,
            offload=offload,
        )
    logger.info("guardrails: %s", ", ".join(loaded.parts))
    return Safety(loaded, release, loading=recorder)
