"""Seconds and peak memory of each stage of a run, and the software and device that it ran on."""

from __future__ import annotations

import logging
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from worldline.events import report_event
from worldline.files import GIGABYTE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage of a request.

    Attributes:
        seconds: wall time, until the device has finished.
        peak_gb: peak memory in 1e9 bytes: on a GPU reserved by torch during the stage, else of the
            process since its start.
        ended: Unix time.
    """

    name: str
    seconds: float
    peak_gb: float
    ended: float


class Recorder:
    """Stages of one run on one device.

    Attributes:
        stages: in order of their first start.
        facts: choices made on the way, such as the decoder.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: list[Stage] = []
        self.facts: dict[str, Any] = {}
        self._begun: dict[str, float] = {}  # name of a stage -> first start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block inside; a stage that raises is recorded too.

        Stages of one name, as of networks that take turns, are one stage: their seconds add up.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        self._begun.setdefault(name, started)
        report_event("stage", f"{name} starts", stage=name, state="started")
        try:
            yield
        finally:
            if cuda:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_reserved(self.device)
            else:
                unit = 1 if sys.platform == "darwin" else 1024
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            seconds = round(time.perf_counter() - started, 4)
            stage = Stage(name, seconds, round(peak / GIGABYTE, 3), round(time.time(), 4))
            facts = {"state": "ended", "seconds": seconds, "peak_gb": stage.peak_gb}
            report_event("stage", f"{name} took {seconds:.1f} s", stage=name, **facts)
            self._add(stage)

    def _add(self, stage: Stage) -> None:
        for index, previous in enumerate(self.stages):
            if previous.name == stage.name:
                seconds = round(previous.seconds + stage.seconds, 4)
                peak = max(previous.peak_gb, stage.peak_gb)
                self.stages[index] = Stage(stage.name, seconds, peak, stage.ended)
                return
        self.stages.append(stage)

    def followed_by(self, other: Recorder) -> Recorder:
        """Recorder of the stages of both, as they started, and of their facts."""
        joined = Recorder(self.device)
        joined._begun = other._begun | self._begun
        for stage in sorted((*self.stages, *other.stages), key=lambda s: joined._begun[s.name]):
            joined._add(stage)
        joined.facts = {**self.facts, **other.facts}
        return joined

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": round(sum(stage.seconds for stage in self.stages), 4),
            "peak_gb": max((stage.peak_gb for stage in self.stages), default=0.0),
            "stages": [asdict(stage) for stage in self.stages],
        }


def log_result(name: str, x: Any) -> None:
    """Log shape, dtype and statistics of a stage's result, with --debug."""
    if logger.isEnabledFor(logging.DEBUG):
        x = torch.as_tensor(x)
        values = x.flatten()[:: 1 + x.numel() // 10**7].float()  # a video's copy may be too large
        numbers = [float(of(values)) for of in (torch.mean, torch.std, torch.min, torch.max)]
        statistics = "mean %.4g, std %.4g, min %.4g, max %.4g"
        dtype = str(x.dtype).removeprefix("torch.")
        logger.debug(f"%s: %s %s, {statistics}", name, tuple(x.shape), dtype, *numbers)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the device's name, for a report."""
    facts = {
        "worldline": version("worldline"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts
