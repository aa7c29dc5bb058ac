"""A CPU that stands for a GPU, so that a mistake in offloading is seen without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worldline.parallel.offload import BlockPlan, Offloadable
from worldline.step import Step
from worldline.text.encoder import TextEncoder
from worldline.world import World

STREAMED = ("DiT", "FlowDiT", "T5Encoder", "Reason1Encoder")  # the others move whole


def streamed(module: nn.Module, plan: BlockPlan) -> Offloadable[Any]:
    """A module whose blocks are copied one after another, from a CPU to itself, without room."""
    part = Offloadable(module, "cpu", offload=True, blocks=plan)
    part.offload = True
    part._has_room = lambda: False  # type: ignore[method-assign]
    return part


def stand_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let worlds that are loaded from now on offload what their flags name, though on a CPU.

    The weights of an offloaded part are NaN but for its visits, as if they were not there, and no
    two parts may visit together.

    Returns:
        What visits, by the names of the networks: they are added as they come.
    """
    make, make_text, on_device = Offloadable.__init__, TextEncoder.__init__, Offloadable.on_device
    home: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
    there: list[str] = []
    visits: list[str] = []

    def made(
        part: Offloadable[Any],
        module: nn.Module,
        device: Any,
        *,
        offload: bool,
        **options: Any,
    ) -> None:
        make(part, module, device, offload=offload, **options)
        part.offload = offload
        if offload:
            home[id(part)] = [(weight, weight.data) for weight in module.parameters()]
            hide(part)

    def made_text(part: TextEncoder[Any], *arguments: Any, offload: bool, **others: Any) -> None:
        make_text(part, *arguments, offload=offload, **others)
        part.offload = offload

    def hide(part: Offloadable[Any]) -> None:
        for weight, value in home[id(part)]:
            weight.data = torch.full_like(value, torch.nan)

    @contextmanager
    def visiting(part: Offloadable[Any], tokens: int | None = None) -> Iterator[nn.Module]:
        if not part.offload:
            yield part.module
            return
        name = type(part.module).__name__
        assert not there, f"{name} comes while {there} is there"
        there.append(name)
        visits.append(name)
        for weight, value in home[id(part)]:
            weight.data = value
        try:
            with on_device(part, tokens) as module:
                yield module
        finally:
            hide(part)
            there.remove(name)

    monkeypatch.setattr(Offloadable, "__init__", made)
    monkeypatch.setattr(TextEncoder, "__init__", made_text)
    monkeypatch.setattr(Offloadable, "on_device", visiting)
    monkeypatch.setattr(Offloadable, "_has_room", lambda part: False)
    return visits


def check_offloading(
    load: Callable[..., World],
    input: Path,
    options: Mapping[str, Any],
    networks: Mapping[str, str],
    used: Sequence[str],
    flags: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that offloaded networks are there when they are used, and change no pixel.

    Args:
        load: loads the world, by flags.
        input: that is continued.
        options: of the request.
        networks: flag -> the network that it offloads.
        used: the networks in the order of their use, each as often.
        flags: those that are given.
        monkeypatch: of the test.
    """
    resident = list(load().stream(input, **options))
    # an embedding that is kept would spare the text encoder its visit
    monkeypatch.setenv("WORLDLINE_CACHE", os.environ["WORLDLINE_CACHE"] + "-of-another")
    visits = stand_for_a_gpu(monkeypatch)
    steps = list(load(**dict.fromkeys(flags, True)).stream(input, **options))
    offloaded = {networks[flag] for flag in flags}
    assert visits == [name for name in used if name in offloaded]
    video = steps[-1].video
    assert video is not None
    reported = {flag.removeprefix("offload_"): flag in flags for flag in networks}
    assert video.report["offload"] == reported
    streamed = [flag for flag in networks if flag in flags and networks[flag] in STREAMED]
    assert video.report["streamed"] == [flag.removeprefix("offload_") for flag in streamed]
    for made in (frames_of, previews_of):
        assert np.array_equal(made(steps), made(resident))
    assert bool(len(previews_of(steps))) == bool(options.get("preview_every"))


def frames_of(steps: Sequence[Step]) -> NDArray[np.uint8]:
    """Frames as they came, and those of the video behind them."""
    return np.concatenate([step.frames for step in steps if step.frames is not None])


def previews_of(steps: Sequence[Step]) -> list[NDArray[np.uint8]]:
    return [step.preview for step in steps if step.preview is not None]
