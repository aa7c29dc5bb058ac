"""What a guardrail is, and the chain of those that one world runs.

A guardrail that cannot load or cannot decide is an error, never a silent "safe".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from worldline.errors import CheckpointError, Error, GuardrailRefusal, InputError
from worldline.parallel.offload import Part


@dataclass(frozen=True)
class Verdict:
    """What one guardrail says.

    Attributes:
        safe: it found nothing.
        check: which of its checks refused, such as "exact"; "" if safe or if it has only one.
        categories: what it found, in its own names; may be empty.
    """

    safe: bool
    check: str = ""
    categories: tuple[str, ...] = ()


class Guard(Protocol):
    """What all of them have."""

    @property
    def name(self) -> str: ...

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Its networks, for whoever moves them; each runs where its weights are."""


class TextGuard(Guard, Protocol):
    """Judges a prompt."""

    def check(self, text: str) -> Verdict: ...


class VideoGuard(Guard, Protocol):
    """Judges a video, frames uint8 (T, H, W, 3)."""

    def check(self, frames: np.ndarray) -> Verdict: ...


class VideoFilter(Guard, Protocol):
    """Changes a video that was found safe, such as by blurring faces."""

    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        """Return frames of the same shape, and how many regions were changed."""


@dataclass(frozen=True)
class Ran:
    """One line of a report: which guardrail ran, on what, and its verdict.

    Attributes:
        guard: its name.
        subject: "prompt", "upsampled prompt", "video of 121 frames".
        verdict: "safe", "refused", or what a filter did.
        check: of `Verdict`.
        categories: of `Verdict`.
    """

    guard: str
    subject: str
    verdict: str
    check: str = ""
    categories: tuple[str, ...] = ()


class Guardrails:
    """The guardrails of one world, in the order in which they are asked.

    Attributes:
        ran: what ran since the last `restart`, in order.
    """

    def __init__(
        self,
        text: Sequence[TextGuard] = (),
        video: Sequence[VideoGuard] = (),
        filters: Sequence[VideoFilter] = (),
    ) -> None:
        self.text = tuple(text)
        self.video = tuple(video)
        self.filters = tuple(filters)
        self.ran: list[Ran] = []
        self._parts: dict[nn.Module, Part[nn.Module]] = {}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Every network, in the order of use."""
        guards = (*self.text, *self.video, *self.filters)
        return tuple(network for guard in guards for network in guard.networks)

    def wait_in_host_memory(self, device: torch.device) -> None:
        """Bring the networks, which are on the host, to `device` while they are used, from now on.

        On a CPU they stay where they are.
        """
        self._parts = {n: Part(n, device, offload=True) for n in self.networks}

    @property
    def offload(self) -> bool:
        """Whether the networks' home is the host, and they run elsewhere."""
        return any(part.offload for part in self._parts.values())

    @property
    def visitor_bytes(self) -> int:
        """Bytes that the networks of a guard hold at most where they run, of those that wait."""
        waiting = {network for network, part in self._parts.items() if part.offload}
        sizes = (
            sum(w.nbytes for n in guard.networks if n in waiting for w in n.parameters())
            for guard in (*self.text, *self.video, *self.filters)
        )
        return max(sizes, default=0)

    def for_request(self) -> Guardrails:
        """Return the same guardrails with a list `ran` of their own."""
        own = copy.copy(self)
        own.restart()
        return own

    def restart(self) -> None:
        """Forget what ran: a new request begins."""
        self.ran = []

    def report(self) -> list[dict[str, Any]]:
        """Return `ran` as it goes into a run's JSON; the prompt's words are not in it."""
        return [asdict(ran) for ran in self.ran]

    def check_prompt(self, text: str, subject: str = "prompt") -> None:
        """Ask every text guard until one refuses.

        Raises:
            GuardrailRefusal: one refused; its stage is "prompt".
        """
        for guard in self.text:
            with self._on_device(guard):
                verdict = guard.check(text)
            self._judge(guard.name, verdict, subject, "prompt")

    def check_video(self, frames: np.ndarray) -> np.ndarray:
        """Ask every video guard, then pass the frames through the filters.

        Args:
            frames: uint8 (T, H, W, 3); not changed.

        Raises:
            GuardrailRefusal: one refused; its stage is "video".
            InputError: these are no such frames.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise InputError(
                f"guardrails look at uint8 frames (T, H, W, 3), not {frames.dtype} {frames.shape}"
            )
        subject = f"video of {len(frames)} frames"
        for guard in self.video:
            with self._on_device(guard):
                verdict = guard.check(frames)
            self._judge(guard.name, verdict, subject, "video")
        for each in self.filters:
            shape = frames.shape
            with self._on_device(each):
                frames, count = each.apply(frames)
            if frames.shape != shape:
                raise Error(f"{each.name} made {frames.shape} of frames {shape}")
            self.ran.append(Ran(each.name, subject, f"{count} regions changed"))
        return frames

    @contextmanager
    def _on_device(self, guard: Guard) -> Iterator[None]:
        with ExitStack() as stack:
            for network in guard.networks:
                if network in self._parts:
                    stack.enter_context(self._parts[network].on_device())
            yield

    def _judge(self, guard: str, verdict: Verdict, subject: str, stage: str) -> None:
        said = "safe" if verdict.safe else "refused"
        self.ran.append(Ran(guard, subject, said, verdict.check, verdict.categories))
        if not verdict.safe:
            found = f" ({', '.join(verdict.categories)})" if verdict.categories else ""
            raise GuardrailRefusal(f"guardrail {guard} refused the {subject}{found}", stage)


@contextmanager
def loading(name: str, flag: str, fetched_as: str) -> Iterator[None]:
    """Turn what fails inside into one error that says how to run without the guardrail.

    Args:
        name: of the guardrail.
        flag: what the user would give to run without.
        fetched_as: what `worldline checkpoints download` takes for it.

    Raises:
        CheckpointError: a file is absent, damaged or of another model; it is named.
    """
    try:
        yield
    except (InputError, OSError, ImportError) as error:
        raise CheckpointError(
            f"guardrail {name} cannot load: {error}; `worldline checkpoints download "
            f"{fetched_as}` fetches it; {flag} runs without guardrails"
        ) from error
