"""The chain: first refusal ends it, everything that ran is told, errors are never a "safe"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldline.errors import CheckpointError, GuardrailRefusal, InputError
from worldline.guardrails.base import Guardrails, Verdict, loading
from worldline.parallel.offload import Part

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)


class Says:
    networks: tuple[nn.Module, ...] = ()

    def __init__(self, name: str, verdict: Verdict | Exception) -> None:
        self.name = name
        self.verdict = verdict

    def check(self, subject: object) -> Verdict:
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


class Adds:
    name = "adds"
    networks = ()

    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        return frames + 1, 2


SAFE = Verdict(True)
UNSAFE = Verdict(False, "exact", ("Hate",))


def test_first_refusal_ends_the_check() -> None:
    chain = Guardrails([Says("a", SAFE), Says("b", UNSAFE), Says("c", SAFE)])
    with pytest.raises(GuardrailRefusal, match="b refused the upsampled prompt") as refusal:
        chain.check_prompt("secret words", "upsampled prompt")
    assert refusal.value.stage == "prompt"
    assert refusal.value.exit_code == 3
    assert "secret" not in str(refusal.value)
    told = [(ran.guard, ran.subject, ran.verdict, ran.check, ran.categories) for ran in chain.ran]
    assert told == [
        ("a", "upsampled prompt", "safe", "", ()),
        ("b", "upsampled prompt", "refused", "exact", ("Hate",)),
    ]
    assert "secret" not in json.dumps(chain.report())
    chain.restart()
    assert chain.report() == []


def test_video_is_judged_then_filtered() -> None:
    chain = Guardrails(video=[Says("v", SAFE)], filters=[Adds()])
    assert (chain.check_video(FRAMES) == 1).all()
    assert not FRAMES.any()
    assert [ran.verdict for ran in chain.ran] == ["safe", "2 regions changed"]
    refusing = Guardrails(video=[Says("v", UNSAFE)], filters=[Adds()])
    with pytest.raises(GuardrailRefusal) as refusal:
        refusing.check_video(FRAMES)
    assert refusal.value.stage == "video"
    assert [ran.guard for ran in refusing.ran] == ["v"]


def test_the_bytes_of_the_largest_guard_that_waits() -> None:
    """A guard's networks come together, guards one after another; what stays visits nothing."""
    small, larger = Says("a", SAFE), Says("b", SAFE)
    small.networks = (nn.Linear(2, 3, bias=False),)
    larger.networks = (nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).half())
    chain = Guardrails([small], video=[larger], filters=[Adds()])
    for device, nbytes in (("cpu", 0), ("meta", 4 * 4 + 4 * 2)):
        assert chain.visitor_bytes == 0
        chain.wait_in_host_memory(torch.device(device))
        assert chain.visitor_bytes == nbytes


def test_a_guard_that_fails_is_no_safe() -> None:
    chain = Guardrails([Says("a", RuntimeError("out of memory"))])
    with pytest.raises(RuntimeError, match="out of memory"):
        chain.check_prompt("words")
    assert chain.ran == []


def test_no_guards_is_safe() -> None:
    chain = Guardrails()
    chain.check_prompt("")
    assert chain.check_video(FRAMES) is FRAMES


@pytest.mark.parametrize("frames", [FRAMES[0], FRAMES.astype(np.float32), FRAMES[..., :1]])
def test_other_arrays_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8"):
        Guardrails().check_video(frames)


def test_what_cannot_load_names_file_and_flag(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with (
        pytest.raises(CheckpointError, match=r"absent.*download rails`.*--no-rails"),
        loading("x", "--no-rails", "rails"),
    ):
        absent.read_bytes()


class Where:
    """Tells whose networks are on the device while it looks."""

    def __init__(self, name: str, there: list[nn.Module]) -> None:
        self.name = name
        self.network = nn.Linear(2, 2)
        self.networks = (self.network,)
        self.there = there
        self.seen: list[list[nn.Module]] = []

    def check(self, _: object) -> Verdict:
        self.seen.append([*self.there])
        return SAFE

    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        self.check(frames)
        return frames, 0


def test_networks_wait_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[nn.Module] = []

    @contextmanager
    def visiting(part: Part[nn.Module]) -> Iterator[nn.Module]:
        there.append(part.module)
        yield part.module
        there.remove(part.module)

    monkeypatch.setattr(Part, "on_device", visiting)
    guards = text, video, blur = [Where(name, there) for name in "tvb"]
    chain = Guardrails([text], [video], [blur])
    assert not chain.offload
    chain.wait_in_host_memory(torch.device("cuda"))
    assert chain.offload
    request = chain.for_request()
    request.check_prompt("x")
    assert [len(guard.seen) for guard in guards] == [1, 0, 0]
    request.check_video(FRAMES)
    for guard in guards:
        assert guard.seen == [[guard.network]]  # itself alone
    chain.wait_in_host_memory(torch.device("cpu"))
    assert not chain.offload


def test_requests_do_not_share_what_ran() -> None:
    chain = Guardrails([Says("a", SAFE)])
    first, second = chain.for_request(), chain.for_request()
    first.check_prompt("x")
    assert len(first.ran) == 1
    assert second.ran == chain.ran == []
