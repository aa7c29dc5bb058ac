"""Batches of samples in a shuffled order, for the processes of a run, resumable to the sample.

Source of the order: torch's `DistributedSampler(shuffle=True)`, as in the released trainers. A
position is that of all processes together, so that any number of them can go on from it.
"""

import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from worldline.errors import Error, InputError, one_line
from worldline.files import readable_size
from worldline.parallel.mesh import ALONE, Axis
from worldline.train.data.clips import Clips, Item
from worldline.train.data.videos import MOST_NAMED

log = logging.getLogger(__name__)

Place = tuple[int, int]  # epoch, and place in its order
Order = Callable[[int], NDArray[np.int64]]  # of an epoch
Failure = tuple[str, str]  # name of a sample, and why it cannot be read
State = dict[str, Any]

_MOST_FAILURES = 100  # samples in a row, after which training stops


def permutation(count: int, seed: int, repeated: bool, epoch: int) -> NDArray[np.int64]:
    """Numbers of all samples in the order of an epoch; in that of the first, where `repeated`."""
    return _shuffled(count, seed if repeated else seed + epoch)


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> NDArray[np.int64]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


class _Stream(Dataset[tuple[Item, list[Failure]]]):
    """Batches by the places of their samples; for one that cannot be read, the next that can.

    Which one that is follows from the order and the files, whatever a process knows of others.
    """

    def __init__(self, clips: Clips, order: Order, seed: int, broken: Mapping[str, str]) -> None:
        self.clips, self.order, self.seed, self.broken = clips, order, seed, {*broken}

    def __getitems__(self, places: Sequence[Place]) -> tuple[Item, list[Failure]]:
        failures: list[Failure] = []
        draw = self.seed, places[0][0]
        for _ in range(_MOST_FAILURES):  # of which each finds one, or is an error that passes
            found = [self._readable(*place, draw) for place in places]
            indices = [index for index in found if index is not None]
            if len(indices) < len(places):
                break
            try:
                return default_collate(self.clips.items(indices, draw)), failures
            except (InputError, OSError):
                failures += filter(None, (self._failure(index, draw) for index in {*indices}))
        return {}, failures

    def _readable(self, epoch: int, place: int, draw: Sequence[int]) -> int | None:
        """The first sample from a place on that is not known to be broken; None if all are."""
        order = self.order(epoch)
        indices = (int(order[(place + more) % len(order)]) for more in range(len(order)))
        return next((i for i in indices if self.clips.name(i, draw) not in self.broken), None)

    def _failure(self, index: int, draw: Sequence[int]) -> Failure | None:
        """Name of a sample that cannot be read, and why; from now on it is known."""
        try:
            self.clips.items([index], draw)
        except (InputError, OSError) as error:
            name = self.clips.name(index, draw)
            self.broken.add(name)
            return name, one_line(error)
        return None


def _worker_context() -> Any:
    """Processes that are forked from one that has no threads, devices or locks of this one."""
    context = get_context("forkserver")  # spawned ones may abort in torch when they end
    context.set_forkserver_preload([f"{__package__}.forkserver", "__main__", __name__])
    return context


def _end_with_parent(worker: int) -> None:
    """Let a worker end with the process that it reads for; torch watches the one that forked it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of a group: that one decides
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader:
    """Endless batches of a data set: `default_collate` of its items, read ahead by workers.

    Each epoch is a shuffle of the samples; processes take turns in it, and what does not fill a
    batch of all at its end is left out. Fewer samples than one such batch are repeated. A sample
    that cannot be read is logged, and the next one of the order takes its place.

    Attributes:
        epoch: number of the epoch, from 0.
        sample: samples of the epoch that all processes together have taken.
        broken: samples that could not be read, by name, and why.

    Args:
        clips: the data set.
        batch_size: samples of a batch of this process.
        num_workers: processes that read ahead; 0 reads in this one, when a batch is asked for.
        pin_memory: as of `torch.utils.data.DataLoader`.
        seed: of the shuffles, 0 or more.
        repeated: every epoch has the same order, as in the released trainers.
        ranks: processes with batches of their own (data parallel).
        together: processes that train on one batch, which the first of them reads.
    """

    def __init__(
        self,
        clips: Clips,
        *,
        batch_size: int = 1,
        num_workers: int = 2,
        pin_memory: bool = False,
        seed: int = 0,
        repeated: bool = False,
        ranks: Axis = ALONE.dp,
        together: Axis = ALONE.tp,
    ) -> None:
        self.clips, self.batch_size, self.num_workers = clips, batch_size, num_workers
        self.pin_memory, self.ranks, self.together = pin_memory, ranks, together
        self.shuffle = {"count": len(clips), "seed": seed, "repeated": repeated}
        self.order: Order = partial(permutation, len(clips), seed, repeated)
        self.epoch = self.sample = 0
        self.broken: dict[str, str] = {}

    def __str__(self) -> str:
        broken = f"; {len(self.broken)} samples cannot be read" if self.broken else ""
        return f"{self.clips}{broken}"

    def __iter__(self) -> Generator[Item, None, None]:
        """Batches from the position on, which moves as they are taken.

        Raises:
            InputError: a hundred samples in a row, or all, cannot be read.
            Error: a worker ended.
        """
        with closing(self._batches()) as batches:  # begins in the first process alone
            for epoch, sample in self._positions():
                batch, failures = self.together.once(lambda: next(batches))
                self._report(failures)
                if not batch:
                    named = "; ".join(map(": ".join, [*self.broken.items()][-2:]))
                    number = len(failures) or len(self.broken)
                    raise InputError(f"{number} samples in a row cannot be read ({named})")
                self.epoch, self.sample = epoch, sample + self._taken
                yield batch

    def state(self) -> State:
        """Position and order, as JSON has it; all processes ask for it together."""
        for broken in self.ranks.every(self.broken):
            self._report([*broken.items()])
        position = {"epoch": self.epoch, "sample": self.sample, "skipped": dict(self.broken)}
        return {**position, **self.shuffle, "data": self.clips.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any number of processes; before batches are asked for.

        Raises:
            InputError: it is of another data set or order.
        """
        here = {**self.shuffle, "data": self.clips.fingerprint}
        pairs = [f"{k} {state.get(k)}, here {v}" for k, v in here.items() if state.get(k) != v]
        if pairs:
            raise InputError(f"the position is of other data: {'; '.join(pairs)}")
        self.epoch, self.sample = state["epoch"], state["sample"]
        self.broken = dict(state["skipped"])

    @property
    def _taken(self) -> int:
        """Samples of a batch of all processes together."""
        return self.batch_size * self.ranks.count

    def _positions(self) -> Iterator[Place]:
        """Positions before each batch of all processes."""
        epoch, sample = self.epoch, self.sample
        while True:
            if sample and sample + self._taken > len(self.clips):
                epoch, sample = epoch + 1, 0
            yield epoch, sample
            sample += self._taken

    def _places(self) -> Iterator[list[Place]]:
        """Places of the samples of each batch of this process."""
        for epoch, sample in self._positions():
            places = self.ranks.deal(range(sample, sample + self._taken))
            yield [(epoch, place) for place in places]

    def _batches(self) -> Generator[tuple[Item, list[Failure]], None, None]:
        loader = DataLoader(
            _Stream(self.clips, self.order, self.shuffle["seed"], self.broken),
            batch_sampler=self._places(),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=_end_with_parent,
            multiprocessing_context=_worker_context() if self.num_workers else None,
            generator=torch.Generator(),  # else the number for workers is drawn from the run's
        )
        batches: Any = None
        try:
            # in the main thread, torch would raise the death of a worker anywhere in its code
            with ThreadPoolExecutor(1) as pool:
                batches = pool.submit(iter, loader).result()
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
            room = readable_size(shared.f_bavail * shared.f_frsize) if shared else "unknown space"
            raise Error(
                f"a worker that reads samples ended: {one_line(error)}; it may lack memory "
                f"(/dev/shm has {room} free), so give fewer workers, or 0"
            ) from None
        finally:  # an error's trace may keep them, and Python waits at its end for those it ends
            getattr(batches, "_shutdown_workers", lambda: None)()

    def _report(self, failures: Sequence[Failure]) -> None:
        for name, reason in failures:
            if name not in self.broken and len(self.broken) < MOST_NAMED:
                more = len(self.broken) == MOST_NAMED - 1
                end = "; further ones are only counted" if more else ""
                log.warning("skipped: %s: %s%s", name, reason, end)
            self.broken[name] = reason
