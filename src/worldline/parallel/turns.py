"""Work of a batch that groups of processes take in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from worldline.parallel import job

if TYPE_CHECKING:
    from worldline.parallel.mesh import Mesh

_POLL_S = 0.1
_batches = count()  # of this process, as of each


class Turns:
    """Units of work, each taken by the next group that is free, and outcomes, which all receive.

    They go through the rendezvous store: collectives would let a group wait for the slowest.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.name = mesh, f"turns/{next(_batches)}"
        self.store: Any = job.store() if mesh.dp.count > 1 else None
        self.units, self.received = count(), 0
        self.own: list[Any] = []  # outcomes, where there is one group

    def take(self) -> int:
        """Number of the next unit, for this group alone."""
        if self.store is None:
            return next(self.units)
        return self.mesh.video.once(lambda: int(self.store.add(f"{self.name}/taken", 1)) - 1)

    def post(self, outcome: Any) -> None:
        """Make an outcome, which JSON can hold, known to all."""
        if self.store is None:
            self.own.append(outcome)
        elif self.mesh.video.first:
            place = self.store.add(f"{self.name}/posted", 1) - 1
            self.store.set(f"{self.name}/{place}", json.dumps(outcome))

    def outcomes(self, count: int = 0) -> Iterator[Any]:
        """Outcomes since the last call, in the order in which they came.

        Args:
            count: of all outcomes, that are waited for.
        """
        while True:
            key = f"{self.name}/{self.received}"
            if self.store is None:
                yield from self.own[self.received :]
                self.received = len(self.own)
                return
            if self.store.check([key]):
                self.received += 1
                yield json.loads(self.store.get(key))
            elif self.received >= count:
                return
            else:
                time.sleep(_POLL_S)
