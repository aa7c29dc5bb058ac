"""Pictures whose rows processes share, with the rows beyond each part exchanged (a halo).

Each process computes a band of rows at every resolution. A convolution needs one row more of each
neighbour; norms and attention over a whole frame need sums, or the rows, of all. Results are those
of one process, but for the order of sums.
Axes: B batch, T frames, H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from worldline.parallel.mesh import Axis, Mesh
from worldline.shapes import VideoShape

Result = TypeVar("Result")
Yielded = TypeVar("Yielded")

# Pixels of a frame for each process, below which the first computes alone. A convolution of so many
# takes 0.1 ms on an H200 (1.95 s for 704 x 1280 by the 800 convolutions of Wan), no longer than to
# start an exchange; through gloo that takes some ms. At 0 all is split, at infinity nothing.
LEAST_PIXELS = 40_000


@dataclass(frozen=True)
class Rows:
    """Rows of a picture, shared by processes from the top down; by default all are here.

    Attributes:
        axis: the processes.
        heights: rows of each, in latent cells; one number where the first computes all.
    """

    axis: Axis = field(default_factory=Axis)
    heights: tuple[int, ...] = (1,)

    @property
    def split(self) -> bool:
        """Whether this process has some of the rows."""
        return len(self.heights) > 1

    def run(self, make: Callable[[], Result]) -> Result:
        """Result of `make`, which all call together, or the first alone."""
        return make() if self.split else self.axis.once(make)

    def steps(self, steps: Generator[Yielded, None, Result]) -> Generator[Yielded, None, Result]:
        """A generator that all run together, or the first alone; see `Axis.steps_once`."""
        return steps if self.split else self.axis.steps_once(steps)

    def largest(self, nbytes: int) -> int:
        """Bytes of the largest part of what takes so many."""
        return -(-nbytes * max(self.heights) // sum(self.heights))

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's rows along axis `dim`, at any resolution."""
        if not self.split:
            return x
        start, end = (sum(self.heights[:rank]) for rank in (self.axis.rank, self.axis.rank + 1))
        scale = x.shape[dim] // sum(self.heights)
        return x.narrow(dim, scale * start, scale * (end - start))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Rows of all processes, joined along axis `dim`."""
        if not self.split:
            return x
        scale = x.shape[dim] // self.heights[self.axis.rank]
        missing = scale * max(self.heights) - x.shape[dim]  # all send as many
        parts = self.axis.parts(F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)))
        sizes = (scale * height for height in self.heights)
        return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, sizes, strict=True)], dim)

    def collect(self, x: Tensor, dim: int) -> Tensor:
        """`gather` to the CPU of the first process; zeros that take no memory in the others."""
        whole = self.gather(x, dim)
        if self.split and not self.axis.first:
            return torch.zeros((), dtype=x.dtype, device="cpu").expand(whole.shape)
        return whole.cpu()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the parts of all processes, in place."""
        return self.axis.all_reduce(x) if self.split else x

    def pool(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the rows of all processes, of those over each one's."""
        if not self.split:
            return mean, variance
        share = self.heights[self.axis.rank] / sum(self.heights)
        # float64: a mean may be far above the deviation
        first, second = mean.double(), variance.double()
        moments = self.sum(torch.stack([first, second + first.square()]) * share)
        return moments[0].to(mean.dtype), (moments[1] - moments[0].square()).to(mean.dtype)

    def convolve(self, layer: Callable[[Tensor], Tensor], cells: Tensor, stride: int = 1) -> Tensor:
        """A convolution, 3 x 3 in space, of this process's rows of cells (B, T, H, W, C).

        `layer` pads with zeros: all sides, or with a stride of 2 the right and the bottom alone. At
        the border to a neighbour its result is replaced by that of three rows, one of which arrives
        while it computes all others.
        """
        if not self.split:
            return layer(cells)
        height, rank = cells.shape[2], self.axis.rank
        ends = {-1: cells[:, :, :1].contiguous(), 1: cells[:, :, -1:].contiguous()}
        beyond = {side: torch.zeros_like(end) for side, end in ends.items()}
        sides = [side for side in ends if 0 <= rank + side < len(self.heights)]
        sent = [side for side in sides if stride == 1 or side < 0]
        received = [side for side in sides if stride == 1 or side > 0]
        exchange = [
            dist.P2POp(way, rows[side], group=self.axis.group, group_peer=rank + side)
            for way, rows, sides in ((dist.isend, ends, sent), (dist.irecv, beyond, received))
            for side in sides
        ]
        pending = dist.batch_isend_irecv(exchange)
        result = layer(cells)
        for work in pending:
            work.wait()
        if received:
            rows = {-1: beyond[-1], height: beyond[1]}
            centres = [0 if side < 0 else height - 1 for side in received]
            strips = [
                torch.cat([rows.get(n, cells[:, :, n : n + 1]) for n in (c - 1, c, c + 1)], dim=2)
                for c in centres
            ]
            borders = layer(torch.cat(strips))[:, :, 1 // stride].chunk(len(strips))
            for centre, border in zip(centres, borders, strict=True):
                result[:, :, centre // stride] = border
        return result


WHOLE = Rows()


def share_rows(mesh: Mesh, video: VideoShape, cell: int) -> Rows:
    """Rows of a video over the processes that make it, or all in the first where they are few.

    Args:
        mesh: of the processes; of one that is not made, its layout counts.
        video: its size.
        cell: pixels that a latent cell covers on each side.
    """
    axis, rows = mesh.video, video.height // cell
    if axis.count != mesh.layout.video:
        axis = Axis(count=mesh.layout.video)
    if rows < axis.count or video.height * video.width < LEAST_PIXELS * axis.count:
        return Rows(axis)
    each, more = divmod(rows, axis.count)
    return Rows(axis, tuple(each + (rank < more) for rank in range(axis.count)))
