"""The chain: the first refusal ends it, all that ran is in the report, errors are never safe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from torch import nn

from worldline.errors import GuardrailRefusal
from worldline.guardrails.base import Guardrails, Verdict
from worldline.parallel.offload import Part

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)
SAFE = Verdict(True)
UNSAFE = Verdict(False, "exact", ("Hate",))


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
    def visit(part: Part[nn.ModuleList]) -> Iterator[nn.Module]:
        networks.extend(part.module)
        yield part.module
        networks.clear()

    monkeypatch.setattr(Part, "on_device", visit)
    monkeypatch.setattr(Fixed, "on_device", networks, raising=False)
    return networks


def test_first_refusal_ends_the_check() -> None:
    chain = Guardrails([Fixed("a"), Fixed("b", UNSAFE), Fixed("c")])
    with pytest.raises(GuardrailRefusal, match="b refused the upsampled prompt") as refusal:
        chain.check_prompt("secret words", "upsampled prompt")
    assert refusal.value.stage == "prompt"
    assert refusal.value.exit_code == 3
    assert "secret" not in str(refusal.value)
    assert [tuple(check.values()) for check in chain.checks] == [
        ("a", "upsampled prompt", "safe", "", ()),
        ("b", "upsampled prompt", "refused", "exact", ("Hate",)),
    ]
    assert "secret" not in json.dumps(chain.checks)


def test_video_is_judged_then_filtered() -> None:
    chain = Guardrails(video=[Fixed("v")], filters=[Fixed("f")])
    assert (chain.check_video(FRAMES) == 1).all()
    assert not FRAMES.any()
    assert [check["verdict"] for check in chain.checks] == ["safe", "2 regions changed"]
    refusing = Guardrails(video=[Fixed("v", UNSAFE)], filters=[Fixed("f")])
    with pytest.raises(GuardrailRefusal) as refusal:
        refusing.check_video(FRAMES)
    assert refusal.value.stage == "video"
    assert [check["guard"] for check in refusing.checks] == ["v"]


def test_a_guard_that_fails_is_not_safe() -> None:
    chain = Guardrails([Fixed("a", RuntimeError("out of memory"))])
    with pytest.raises(RuntimeError, match="out of memory"):
        chain.check_prompt("words")
    assert chain.checks == []


def test_no_guards_is_safe() -> None:
    chain = Guardrails()
    chain.check_prompt("")
    assert chain.check_video(FRAMES) is FRAMES


def test_offloaded_guards_visit_the_device_one_by_one() -> None:
    guards = [Fixed(name, SAFE, nn.Linear(2, 2)) for name in "tvf"]
    text, video, blur = guards
    chain = Guardrails([text], [video], [blur], device="meta", offload=True)
    request = chain.for_request()
    request.check_prompt("x")
    assert [len(guard.calls) for guard in guards] == [1, 0, 0]
    request.check_video(FRAMES)
    for guard in guards:
        assert guard.calls == [[*guard.networks]]


def test_bytes_of_the_networks() -> None:
    """A guard's networks come together, guards one after another."""
    small = Fixed("a", SAFE, nn.Linear(2, 3, bias=False))
    large = Fixed("b", SAFE, nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).half())
    for device, offload, resident, offloaded in (
        ("cpu", False, 0, 0),
        ("cpu", True, 0, 0),
        ("meta", False, 48, 0),
        ("meta", True, 0, 24),
    ):
        chain = Guardrails([small], [large], [Fixed("f")], device=device, offload=offload)
        assert (chain.resident_bytes, chain.offloaded_bytes) == (resident, offloaded)
        assert chain.offload == bool(offloaded)


def test_requests_do_not_share_their_checks() -> None:
    chain = Guardrails([Fixed("a")])
    first, second = chain.for_request(), chain.for_request()
    first.check_prompt("x")
    assert len(first.checks) == 1
    assert second.checks == chain.checks == []
