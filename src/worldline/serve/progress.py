"""Progress of jobs in percent and seconds, by what such jobs took before."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from statistics import median

from worldline.serve.records import Job

# share of each kind of step in a job's time, until one of its world and shape was measured
DEFAULT = {"text": 3.0, "encode": 1.0, "denoise": 90.0, "decode": 6.0}
_ORDER = ("text", "encode", "tokens", "denoise", "decode")
_LONGEST, _RECENT = 512, 20  # shapes, and jobs of one world, that are remembered


class Progress:
    """How much of one job is done.

    Attributes:
        percent: 0 to 99; never falls.
        seconds: measured by kind of step.
        step_seconds: longest time between two steps of a kind of several, 0 before there are two.
    """

    def __init__(self, known: Mapping[str, float] | None, now: float, percent: int = 0) -> None:
        self.percent, self.step_seconds = percent, 0.0
        self.seconds: dict[str, float] = {}
        self._known = {kind: seconds for kind, seconds in (known or {}).items() if seconds > 0}
        self._began = self._since = now
        self._done: dict[str, float] = {}
        self._last = ("", 0, 0)
        self._first: tuple[str, float, float] | None = None  # kind, share and time of a main step
        self._pace: float | None = None  # seconds of the whole main stage, by its later steps

    def step(self, kind: str, done: int, total: int, now: float) -> tuple[str, float]:
        """Take a step into account; the kind that the time since the last one belongs to."""
        before, before_done, before_total = self._last
        # the time after "text 0 of 1" is of the text, that after "denoise 35 of 35" is not
        spent = before if before and before_done < before_total else kind
        seconds = now - self._since
        self.seconds[spent] = self.seconds.get(spent, 0.0) + seconds
        if spent == kind and total > 1:
            self.step_seconds = max(self.step_seconds, seconds)
        if before not in ("", kind) and before_total <= 1:
            self._done[before] = 1.0
        for earlier in _ORDER[: _ORDER.index(kind)] if kind in _ORDER else ():
            self._done.setdefault(earlier, 1.0)  # a job without input has nothing to encode
        self._done[kind] = min(1.0, done / total) if total > 0 else 0.0
        self._last, self._since = (kind, done, total), now
        if kind in ("tokens", "denoise") and done > 0 and total > 0:
            self._first = self._first or (kind, done / total, now)
            first, share, when = self._first
            if kind == first and done / total > share:  # the first step warms up, and counts not
                self._pace = (now - when) / (done / total - share)
        self.percent = max(self.percent, min(99, int(100 * self._fraction())))
        return spent, seconds

    def remaining(self, now: float) -> float | None:
        """Seconds until it is done; None before two steps of its main stage, or a known job."""
        fraction = self._fraction()
        if self._known:
            whole = sum(self._known.values())
            planned = whole * fraction
            # a machine that is slower today is so for the rest, too
            pace = min(4.0, max(0.25, (self._since - self._began) / planned)) if planned > 1 else 1
            return max(0.0, (whole - planned) * pace - (now - self._since))
        if self._pace is None:
            return None
        left = (1 - fraction) * 100 / DEFAULT["denoise"] * self._pace
        return max(0.0, left - (now - self._since))

    def _fraction(self) -> float:
        if not self._known:
            done = dict(self._done)
            if self._last[0] == "tokens" or "tokens" in self.seconds:
                done["denoise"] = done.get("tokens", 0.0)  # an autoregressive world has no other
            return sum(weight * done.get(kind, 0.0) for kind, weight in DEFAULT.items()) / 100
        whole = sum(self._known.values())
        return sum(self._known[kind] * self._done.get(kind, 0.0) for kind in self._known) / whole


class Estimates:
    """Seconds that jobs took, by world and shape."""

    def __init__(self) -> None:
        self._stages: OrderedDict[Hashable, Mapping[str, float]] = OrderedDict()
        self._jobs: OrderedDict[Hashable, float] = OrderedDict()
        self._recent: dict[str, deque[float]] = {}
        self._slowest: dict[str, float] = {}

    def stages(self, job: Job) -> Mapping[str, float] | None:
        """Seconds by kind of step of the last such job; None before one was measured."""
        return self._stages.get(_key(job))

    def seconds(self, job: Job) -> float | None:
        """Seconds of the last such job, else of a usual one of its world; None before one."""
        recent = self._recent.get(job.model)
        return self._jobs.get(_key(job), median(recent) if recent else None)

    def slowest_step(self, world: str) -> float:
        return self._slowest.get(world, 0.0)

    def record_step(self, world: str, seconds: float) -> None:
        self._slowest[world] = max(self.slowest_step(world), seconds)

    def record(self, job: Job, seconds: float, stages: Mapping[str, float]) -> None:
        key = _key(job)
        self._jobs[key] = seconds
        self._jobs.move_to_end(key)
        if sum(stages.values()) > 0:
            self._stages[key] = dict(stages)
            self._stages.move_to_end(key)
        self._recent.setdefault(job.model, deque(maxlen=_RECENT)).append(seconds)
        for table in (self._jobs, self._stages):
            while len(table) > _LONGEST:
                table.popitem(last=False)


def stages_of(durations: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind of step, of a report's stages, some of which have no steps."""
    return {kind: durations[kind] for kind in _ORDER if kind in durations}


def _key(job: Job) -> Hashable:
    shape = tuple(str(job.shape.get(name)) for name in ("num_frames", "height", "width"))
    return (job.model, *shape, str(job.request.get("num_steps")), job.input_kind)
