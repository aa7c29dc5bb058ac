"""Processes of one job arranged as a mesh, and what they exchange.

Every process runs the same program on the same arguments. Code asks an `Axis` to split, join, sum
or share; with one process nothing is sent, and nothing is copied.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from datetime import timedelta
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from worldline.errors import Error, one_line

# a collective may wait so long for a process that loads or decodes; a dead one ends all sooner
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

Result = TypeVar("Result")
Yielded = TypeVar("Yielded")


@dataclass(frozen=True)
class Axis:
    """Processes that share one thing: the parts of a video, of a tensor, of a batch.

    Attributes:
        rank: place of this process among them.
        count: number of them.
        group: through which they talk; None where there is one.
        device: where this process computes.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, and that computes what is shared."""
        return self.rank == 0

    def span(self, size: int) -> tuple[int, int]:
        """Start and length of this process's part of `size`, which is cut into equal ones."""
        return self.rank * (size // self.count), size // self.count

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of an axis that is cut into equal ones."""
        return x.chunk(self.count, dim)[self.rank] if self.count > 1 else x

    def deal(self, things: Sequence[Result]) -> Sequence[Result]:
        """Those of some things that are this process's."""
        return things[self.rank :: self.count]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def share(self, x: Tensor) -> Tensor:
        """The first process's tensor, in place."""
        if self.count > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def parts(self, x: Tensor) -> list[Tensor]:
        """What each process holds, in their order; all of one shape."""
        if self.count == 1:
            return [x]
        x = x.contiguous()
        every = x.new_empty(self.count, *x.shape)
        self.gather_into(every.view(-1), x.view(-1))
        return [*every]

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """What all hold, joined along an axis."""
        return torch.cat(self.parts(x), dim) if self.count > 1 else x

    def gather_into(self, whole: Tensor, part: Tensor) -> None:
        """Fill a tensor with what all hold, joined along the first axis."""
        # torch 2.13 warns, in every process, of the name that 2.11 knows
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, part, group=self.group)

    def apart(self) -> Axis:
        """The same processes on connections of their own; all of them ask for it."""
        if self.count == 1:
            return self
        ranks = dist.get_process_group_ranks(self.group)
        group = dist.new_group(ranks, COLLECTIVE_TIMEOUT, use_local_synchronization=True)
        return replace(self, group=group)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows that the processes send to this one, for the rows of `x` that go to each.

        Both are in the order of processes, of each as many as the numbers state.
        """
        if self.count == 1:
            return x
        arrived = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(
            arrived, x.contiguous(), list(received), list(sent), group=self.group
        )
        return arrived

    def pass_on(self, x: Tensor, arriving: Tensor) -> Callable[[], None]:
        """Send `x` to the next process while `arriving` is filled by the one before.

        What comes back is to be called: it waits for both.
        """
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(move, y, group=self.group, group_peer=(self.rank + way) % self.count)
                for move, y, way in ((dist.isend, x, 1), (dist.irecv, arriving, -1))
            ]
        )

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype and device, in place, by their means over the processes."""
        if self.count == 1:
            return
        whole = list(tensors)
        flat = self.all_reduce(torch.cat([tensor.flatten() for tensor in whole]))
        flat /= self.count
        for tensor, part in zip(whole, flat.split([t.numel() for t in whole]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
        return any(self.every(value))

    def every(self, value: Result) -> list[Result]:
        """A small value of each process, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def once(self, make: Callable[[], Result]) -> Result:
        """Result of `make`, which the first process calls; what it raises, all raise.

        Tensors arrive on the device of each process, or on the CPU where they were.
        """
        if self.count == 1:
            return make()
        outcome: tuple[bool, Any] = (False, None)
        if self.first:
            try:
                outcome = (True, make())
            except Exception as error:
                outcome = (False, error)
        return self._broadcast(outcome)

    def together(self, make: Callable[[], Result]) -> Result:
        """Result of `make`, which each process calls; all raise the first error of theirs."""
        if self.count == 1:
            return make()
        result: Any = None
        own: Exception | None = None
        try:
            result = make()
        except Exception as error:
            own = error
        for rank, failure in enumerate(self.every(own and _sendable(own))):
            if failure is not None:  # all raise one class and the same words
                raise own if own is not None and rank == self.rank else failure
        return result

    def steps_once(
        self, steps: Generator[Yielded, None, Result]
    ) -> Generator[Yielded, None, Result]:
        """What a generator yields, in the first process alone, and its result or error, in all."""
        if self.count == 1:
            return (yield from steps)
        outcome: tuple[bool, Any] = (False, None)
        if self.first:
            try:
                outcome = (True, (yield from steps))
            except Exception as error:
                outcome = (False, error)
        else:
            steps.close()
        return self._broadcast(outcome)

    def _broadcast(self, outcome: tuple[bool, Any]) -> Any:
        """The first process's result or error; its tensors and arrays are sent as they are."""
        file, cpu = io.BytesIO(), torch.device("cpu")
        packer, sent = _Packer(file), [(b"", list[Any](), list[int]())]
        if self.first:
            done, value = outcome
            packer.dump((done, value if done else _sendable(value)))
            metas = [(x.shape, x.dtype, x.is_cuda) for x in packer.tensors]
            sent = [(file.getvalue(), metas, [buffer.raw().nbytes for buffer in packer.buffers])]
        dist.broadcast_object_list(sent, group=self.group, group_src=0, device=cpu)
        [(packed, metas, sizes)] = sent
        if self.first:
            tensors = packer.tensors
            arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in packer.buffers]
        else:
            device = {True: self.device, False: cpu}
            tensors = [torch.empty(s, dtype=dtype, device=device[on]) for s, dtype, on in metas]
            arrays = [np.empty(size, np.uint8) for size in sizes]
        with torch.inference_mode(), warnings.catch_warnings():  # tensors may be of inference
            warnings.simplefilter("ignore")  # of arrays that may only be read, as these are
            for tensor in (*tensors, *map(torch.from_numpy, arrays)):
                if tensor.numel():
                    flat = tensor.view(-1).view(torch.uint8)
                    dist.broadcast(flat, group=self.group, group_src=0)
        done, value = outcome if self.first else _Unpacker(packed, tensors, arrays).load()
        if not done:
            raise value
        return value


class _Packer(pickle.Pickler):
    """Pickler that puts the numbers of tensors and arrays aside."""

    def __init__(self, file: io.BytesIO) -> None:
        self.tensors: list[Tensor] = []
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, 5, buffer_callback=self.buffers.append)

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """Unpickler of what the first process of a job packed."""

    def __init__(self, packed: bytes, tensors: list[Tensor], arrays: list[Any]) -> None:
        super().__init__(io.BytesIO(packed), buffers=arrays)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _sendable(error: Exception) -> Exception:
    """The error, or an `Error` of its words where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Error(one_line(error))
    return error


@dataclass(frozen=True)
class Layout:
    """How many processes split each thing.

    Attributes:
        dp: videos of a batch.
        cfg: branches of guidance, 1 or 2.
        cp: tokens of a video.
        tp: heads and channels of a network.
    """

    dp: int = 1
    cfg: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def count(self) -> int:
        return prod(astuple(self))

    @property
    def video(self) -> int:
        """Processes that make one video together."""
        return self.cfg * self.cp * self.tp

    def __str__(self) -> str:
        words = ("data", "guidance", "context", "tensor")
        ways = zip(words, astuple(self), strict=True)
        return ", ".join(f"{word} parallel {n}" for word, n in ways if n > 1) or "one process"


@dataclass(frozen=True)
class Mesh:
    """Processes of a job by what they split; one process by default.

    Attributes:
        layout: number of processes along each of the four axes, of which `tp` is the fastest.
        video: all that make one video together.
        world: all of the job.
    """

    layout: Layout = Layout()
    dp: Axis = Axis()
    cfg: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    video: Axis = Axis()
    world: Axis = Axis()

    def roles(self) -> list[Mesh]:
        """The mesh as the first process of a video has it, and as each other; for plans alone."""
        count = self.video.count
        return [replace(self, video=Axis(rank, count)) for rank in range(min(count, 2))]


ALONE = Mesh()
kept: dict[Any, Any] = {}  # of the job: meshes by their layouts, memory that processes share


def plan_mesh(layout: Layout) -> Mesh:
    """The mesh of a layout as its first process would have it; for plans alone."""
    counts = *astuple(layout), layout.video, layout.count
    return Mesh(layout, *(Axis(count=count) for count in counts))


def make_mesh(layout: Layout, world: Axis) -> Mesh:
    """The mesh of a layout over all processes; made once a process."""
    if layout.count != world.count:
        raise ValueError(f"{layout} is of {layout.count} processes, not of {world.count}")
    if world.count == 1:
        return Mesh(layout, world, world, world, world, world, world)
    if layout not in kept:
        ranks = torch.arange(world.count).view(astuple(layout))
        axes = [_axis(ranks.movedim(dim, -1).flatten(0, -2), world) for dim in range(4)]
        axes += [_axis(ranks.flatten(1), world), world]
        kept[layout] = Mesh(layout, *axes)
    mesh: Mesh = kept[layout]
    return mesh


def _axis(lines: Tensor, world: Axis) -> Axis:
    """The one of some lines of ranks (lines, processes) that holds this process."""
    rows: Sequence[list[int]] = lines.tolist()
    [own] = (row for row in rows if world.rank in row)
    if len(own) == 1:
        return Axis(device=world.device)
    if len(own) == world.count:
        return world
    group, _ = dist.new_subgroups_by_enumeration(list(rows), timeout=COLLECTIVE_TIMEOUT)
    return Axis(own.index(world.rank), len(own), group, world.device)
