"""The chain: first refusal ends it, everything that ran is told, errors are never a "safe"."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from worldline.errors import CheckpointError, GuardrailRefusal, InputError
from worldline.guardrails.base import Guardrails, Verdict, loading

FRAMES = np.zeros((3, 8, 8, 3), np.uint8)


class Says:
    networks = ()

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
    with pytest.raises(CheckpointError, match=r"absent.*--no-rails"), loading("x", "--no-rails"):
        absent.read_bytes()


class Where:
    """Tells on which device its network is while it looks; `meta` stands for a GPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.network = nn.Linear(2, 2)
        self.networks = (self.network,)
        self.seen: list[str] = []

    def check(self, _: object) -> Verdict:
        self.seen.append(self.network.weight.device.type)
        return SAFE

    def apply(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        self.check(frames)
        return frames, 0


def test_networks_wait_in_host_memory() -> None:
    guards = text, video, blur = Where("t"), Where("v"), Where("b")
    chain = Guardrails([text], [video], [blur])
    weights = [guard.network.weight.clone() for guard in guards]
    assert not chain.offload
    chain.wait_in_host_memory(torch.device("meta"))
    assert chain.offload
    request = chain.for_request()
    request.check_prompt("x")
    assert (text.seen, video.seen, blur.seen) == (["meta"], [], [])
    request.check_video(FRAMES)
    assert (text.seen, video.seen, blur.seen) == (["meta"], ["meta"], ["meta"])
    for guard, weight in zip(guards, weights, strict=True):
        assert torch.equal(guard.network.weight, weight)  # at home again
    chain.wait_in_host_memory(torch.device("cpu"))
    assert not chain.offload


def test_requests_do_not_share_what_ran() -> None:
    chain = Guardrails([Says("a", SAFE)])
    first, second = chain.for_request(), chain.for_request()
    first.check_prompt("x")
    assert len(first.ran) == 1
    assert second.ran == chain.ran == []
