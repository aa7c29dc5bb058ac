"""The failure rate of a set of clips, with the error rates of the detectors themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from worldline.evaluate.failures import Failure


@dataclass(frozen=True)
class Rate:
    """A share of clips: `count` of `total`."""

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or self.total == 0:
            raise ValueError(
                f"a rate needs 0 <= count <= total > 0, not {self.count} of {self.total}"
            )

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (Wilson, JASA 22, 1927), of use also at 0 of n."""
        z = 1.959964
        middle = (self.count + z**2 / 2) / (self.total + z**2)
        spread = self.value * (1 - self.value) / self.total + z**2 / (4 * self.total**2)
        half = z * math.sqrt(spread) / (1 + z**2 / self.total)
        low = 0.0 if self.count == 0 else middle - half  # exactly, where rounding would leave 1e-17
        high = 1.0 if self.count == self.total else middle + half
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        counts = f"{self.count} of {self.total}"
        return f"{self.value:.1%} ({counts}; 95 % interval {low:.1%} to {high:.1%})"


# benchmarks/results/failure_detectors.json, evaluation seeds; a test compares the two: false alarms
# on true clips, detection of injected failures
DETECTORS = {
    "false alarms": Rate(3, 661),
    "detection": Rate(348, 350),
}


@dataclass(frozen=True)
class FailureRate:
    """How many clips failed, beside how often the detectors err.

    Attributes:
        failed: clips with at least one failure.
        kinds: clips by kind of failure; a clip with both counts in both.
        failures: failures of each clip, in order.
        detectors: measured error rates of the detectors themselves.
    """

    failed: Rate
    kinds: dict[str, int]
    failures: tuple[tuple[Failure, ...], ...]
    detectors: dict[str, Rate]

    def as_json(self) -> dict[str, object]:
        """Plain numbers and words for a report."""
        return {
            "failure_rate": rate_as_json(self.failed),
            "kinds": self.kinds,
            "failed_clips": [
                {"clip": index, "failures": [asdict(failure) for failure in failures]}
                for index, failures in enumerate(self.failures)
                if failures
            ],
            "detectors": {name: rate_as_json(rate) for name, rate in self.detectors.items()},
        }


def summarise(failures: Sequence[Sequence[Failure]]) -> FailureRate:
    """Failure rate from what `find_failures` returned for each clip; at least one."""
    if not failures:
        raise ValueError("a failure rate needs at least one clip")
    kinds = Counter(kind for clip in failures for kind in {failure.kind for failure in clip})
    failed = Rate(sum(map(bool, failures)), len(failures))
    return FailureRate(failed, dict(kinds), tuple(map(tuple, failures)), dict(DETECTORS))


def rate_as_json(rate: Rate) -> dict[str, object]:
    """A rate's counts, value and interval."""
    low, high = rate.interval
    return {
        "count": rate.count,
        "total": rate.total,
        "rate": round(rate.value, 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }
