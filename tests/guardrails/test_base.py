"""The chain: the first refusal ends it, all that ran is in the report, errors are never safe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from worldline.errors import GuardrailRefusal
from worldline.guardrails.base import Guardrails, Verdict
from worldline.guards import Guards
from worldline.parallel.offload import Offloadable
from worldline.report import Recorder

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)
SAFE = Verdict(True)
UNSAFE = Verdict(False, ("Hate",))


class Fixed:
    """A classifier and filter with one answer; `on_device` holds the networks at each call."""

    on_device: list[nn.Module]

    def __init__(
        self, name: str, verdict: Verdict | Exception = SAFE, *networks: nn.Module
    ) -> None:
        self.name = name
        self.verdict = verdict
        self.networks = networks
        self.calls: list[list[nn.Module]] = []

    def check(self, _: object) -> Verdict:
        self.calls.append([*self.on_device])
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        self.check(frames)
        return frames + 1, 2


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    networks: list[nn.Module] = []

    @contextmanager
    def visit(part: Offloadable[nn.ModuleList]) -> Iterator[nn.Module]:
        networks.extend(part.module)
        yield part.module
        networks.clear()

    monkeypatch.setattr(Offloadable, "on_device", visit)
    monkeypatch.setattr(Fixed, "on_device", networks, raising=False)
    return networks


def test_first_refusal_ends_the_check() -> None:
    guards = [Fixed("a"), Fixed("b", UNSAFE), Fixed("c")]
    with pytest.raises(GuardrailRefusal, match=r"b refused the .* \(Hate\)") as refusal:
        Guardrails(guards).check_prompt("secret words", "upsampled prompt")
    assert refusal.value.stage == "prompt"
    assert refusal.value.exit_code == 3
    assert "secret" not in str(refusal.value)
    assert [len(guard.calls) for guard in guards] == [1, 1, 0]
    checks = Guardrails(guards[:1]).check_prompt("secret words", "upsampled prompt")
    assert checks == [{"guard": "a", "subject": "upsampled prompt", "verdict": "safe"}]


def test_video_is_judged_then_filtered() -> None:
    chain = Guardrails(video=[Fixed("v")], filters=[Fixed("f")])
    frames, checks = chain.check_video(FRAMES)
    assert (frames == 1).all()
    assert not FRAMES.any()
    assert [check["verdict"] for check in checks] == ["safe", "2 regions changed"]
    last = Fixed("f")
    with pytest.raises(GuardrailRefusal) as refusal:
        Guardrails(video=[Fixed("v", UNSAFE)], filters=[last]).check_video(FRAMES)
    assert refusal.value.stage == "video"
    assert last.calls == []


def test_a_guard_that_fails_is_not_safe() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        Guardrails([Fixed("a", RuntimeError("out of memory"))]).check_prompt("words")


def test_no_guards_is_safe() -> None:
    chain = Guardrails()
    assert chain.check_prompt("") == []
    assert chain.check_video(FRAMES)[0] is FRAMES


def test_offloaded_guards_visit_the_device_one_by_one() -> None:
    guards = [Fixed(name, SAFE, nn.Linear(2, 2)) for name in "tvf"]
    text, video, blur = guards
    chain = Guardrails([text], [video], [blur], device="meta", offload=True)
    chain.check_prompt("x")
    assert [len(guard.calls) for guard in guards] == [1, 0, 0]
    chain.check_video(FRAMES)
    for guard in guards:
        assert guard.calls == [[*guard.networks]]


def test_bytes_of_the_networks() -> None:
    """A guard's networks come together, guards one after another."""
    small = Fixed("a", SAFE, nn.Linear(2, 3, bias=False))
    large = Fixed("b", SAFE, nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).half())
    for device, offload, advice, offloaded in (
        ("cpu", False, "", 0),
        ("cpu", True, "", 0),
        ("meta", False, "; offload_guardrail_models=True frees 0.0 GB", 0),
        ("meta", True, "", 24),
    ):
        chain = Guardrails([small], [large], [Fixed("f")], device=device, offload=offload)
        guards = Guards(None, Recorder(torch.device("cpu")), chain)  # type: ignore[arg-type]
        assert (guards.advice, guards.guardrail_bytes) == (advice, offloaded)
        assert guards.offloaded == {"guardrail_models": bool(offloaded)}
