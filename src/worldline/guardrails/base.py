"""A guardrail's verdict, and the chain of guardrails around one request.

A guardrail that cannot load or cannot decide raises an error; nothing counts as safe by default.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from worldline.errors import GuardrailRefusal
from worldline.parallel.offload import Part


@dataclass(frozen=True)
class Verdict:
    """Decision of one guardrail.

    Attributes:
        safe: nothing was found.
        check: the check that refused, such as "exact"; "" for a guardrail with only one.
        categories: findings, in the guardrail's own names; may be empty.
    """

    safe: bool
    check: str = ""
    categories: tuple[str, ...] = ()


class Guard(Protocol):
    """A guardrail; its networks run where their weights are.

    A classifier has `check(prompt or frames) -> Verdict`; a filter, such as one that blurs faces,
    `apply(frames) -> (frames of the same shape, number of regions that were changed)`.
    """

    name: str
    networks: tuple[nn.Module, ...]


class Guardrails:
    """Guardrails in the order of use; the first refusal ends a check.

    Attributes:
        parts: networks by name of their guardrail; offloaded ones visit the device one by one.
        checks: entries of the report, one for each guardrail that ran; without the prompt's words.
    """

    def __init__(
        self,
        text: Sequence[Any] = (),
        video: Sequence[Any] = (),
        filters: Sequence[Any] = (),
        *,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> None:
        self.text = tuple(text)
        self.video = tuple(video)
        self.filters = tuple(filters)
        self.parts = {
            guard.name: Part(nn.ModuleList(guard.networks), torch.device(device), offload=offload)
            for guard in (*self.text, *self.video, *self.filters)
        }
        self.checks: list[dict[str, Any]] = []

    def for_request(self) -> Guardrails:
        """The same guardrails with an empty list `checks`."""
        request = copy.copy(self)
        request.checks = []
        return request

    @property
    def offload(self) -> bool:
        """Whether the networks stay in host memory between checks; never on a CPU."""
        return any(part.offload for part in self.parts.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that stay on a GPU between checks."""
        resident = (p for p in self.parts.values() if not p.offload and p.device.type != "cpu")
        return sum(map(_nbytes, resident))

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the largest offloaded guardrail, which its check brings to the device."""
        return max((_nbytes(part) for part in self.parts.values() if part.offload), default=0)

    def check_prompt(self, prompt: str, subject: str = "prompt") -> None:
        """Ask the text guardrails.

        Args:
            prompt: may be empty, which the blocklist refuses.
            subject: name of the prompt in report and message, such as "upsampled prompt".

        Raises:
            GuardrailRefusal: stage "prompt"; the message has none of the prompt's words.
        """
        for guard in self.text:
            self._check(guard, prompt, subject, "prompt")

    def check_video(self, frames: np.ndarray) -> np.ndarray:
        """Ask the video guardrails, then apply the filters.

        Args:
            frames: uint8 (T, H, W, 3); not changed.

        Raises:
            GuardrailRefusal: stage "video".
        """
        subject = f"video of {len(frames)} frames"
        for guard in self.video:
            self._check(guard, frames, subject, "video")
        for each in self.filters:
            with self.parts[each.name].on_device():
                frames, count = each.apply(frames)
            self._record(each.name, subject, f"{count} regions changed")
        return frames

    def _check(self, guard: Any, content: Any, subject: str, stage: str) -> None:
        with self.parts[guard.name].on_device():
            verdict = guard.check(content)
        self._record(guard.name, subject, "safe" if verdict.safe else "refused", verdict)
        if not verdict.safe:
            categories = f" ({', '.join(verdict.categories)})" if verdict.categories else ""
            message = f"guardrail {guard.name} refused the {subject}{categories}"
            raise GuardrailRefusal(message, stage)

    def _record(
        self, guard: str, subject: str, result: str, verdict: Verdict = Verdict(True)
    ) -> None:
        self.checks.append(
            {
                "guard": guard,
                "subject": subject,
                "verdict": result,
                "check": verdict.check,
                "categories": verdict.categories,
            }
        )


def _nbytes(part: Part[nn.ModuleList]) -> int:
    return sum(weight.nbytes for weight in part.module.parameters())
