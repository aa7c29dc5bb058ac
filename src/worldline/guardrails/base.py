"""A guardrail's verdict, and the chain of guardrails around one request.

A guardrail that cannot load or cannot decide raises an error; nothing counts as safe by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from worldline.errors import GuardrailRefusal
from worldline.parallel.offload import Offloadable

Checks = list[dict[str, str]]  # of a report: each guardrail that ran, without the prompt's words


@dataclass(frozen=True)
class Verdict:
    """Decision of one guardrail.

    Attributes:
        safe: nothing was found.
        reasons: categories or checks that refused, in the guardrail's own names; may be empty.
    """

    safe: bool
    reasons: tuple[str, ...] = ()


class Guardrails:
    """Guardrails in the order of use; the first refusal ends a check.

    Each has a `name` and `networks`, which run where their weights are, and may have a plan of the
    `blocks` of these, by which they are streamed where they are offloaded. A classifier of prompts
    or videos has `check(prompt or frames) -> Verdict`; a filter, such as one that blurs faces,
    `apply(frames) -> (frames of the same shape, number of regions that were changed)`.

    Attributes:
        parts: networks by name of their guardrail; offloaded ones visit the device one by one.
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
        self.text, self.video, self.filters = text, video, filters
        self.parts = {
            guard.name: Offloadable(
                nn.ModuleList(guard.networks),
                device,
                offload=offload,
                blocks=getattr(guard, "blocks", None),
            )
            for guard in (*text, *video, *filters)
        }

    def check_prompt(self, prompt: str, subject: str = "prompt") -> Checks:
        """Ask the text guardrails.

        Args:
            prompt: may be empty, which the blocklist refuses.
            subject: name of the prompt in report and message, such as "upsampled prompt".

        Raises:
            GuardrailRefusal: stage "prompt"; the message has none of the prompt's words.
        """
        return [self._check(guard, prompt, subject, "prompt") for guard in self.text]

    def check_video(self, frames: np.ndarray) -> tuple[np.ndarray, Checks]:
        """Ask the video guardrails, then apply the filters.

        Args:
            frames: uint8 (T, H, W, 3); not changed.

        Raises:
            GuardrailRefusal: stage "video".
        """
        subject = f"video of {len(frames)} frames"
        checks = [self._check(guard, frames, subject, "video") for guard in self.video]
        for guard in self.filters:
            with self.parts[guard.name].on_device():
                frames, count = guard.apply(frames)
            checks.append(_entry(guard, subject, f"{count} regions changed"))
        return frames, checks

    def _check(self, guard: Any, content: Any, subject: str, stage: str) -> dict[str, str]:
        with self.parts[guard.name].on_device():
            verdict = guard.check(content)
        if not verdict.safe:
            reasons = f" ({', '.join(verdict.reasons)})" if verdict.reasons else ""
            raise GuardrailRefusal(f"guardrail {guard.name} refused the {subject}{reasons}", stage)
        return _entry(guard, subject, "safe")


def _entry(guard: Any, subject: str, verdict: str) -> dict[str, str]:
    return {"guard": guard.name, "subject": subject, "verdict": verdict}
