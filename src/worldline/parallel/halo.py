"""Pictures whose rows processes share, with the rows beyond each part exchanged (a halo).

Each process computes a band of rows at every resolution. A convolution needs one row more of each
neighbour; norms and attention over a whole frame need sums, or the rows, of all. Results are those
of one process, but for the order of sums.
Axes: B batch, T frames, H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from worldline.nn.pieces import Rows
from worldline.parallel.mesh import Axis, Mesh
from worldline.shapes import VideoShape

# Pixels of a frame for each process, below which the first computes alone. A convolution of so many
# takes 0.1 ms on an H200 (1.95 s for 704 x 1280 by the 800 convolutions of Wan), no longer than to
# start an exchange; through gloo that takes some ms. At 0 all is split, at infinity nothing.
LEAST_PIXELS = 40_000


@dataclass(frozen=True)
class SharedRows(Rows):
    """Rows of a picture that the first of several processes computes for all.

    Attributes:
        axis: the processes; the first has the frames in the end.
    """

    axis: Axis

    @property
    def computing(self) -> Axis:
        """Processes of which the first computes; this one alone where each has its part."""
        return Axis() if self.split else self.axis

    def largest(self, nbytes: int) -> int:
        """Bytes of the largest part of what takes so many."""
        return nbytes

    def join(self, totals: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over all rows, and frames (T, H, W, 3) of all, where they are wanted."""
        return totals, levels


@dataclass(frozen=True)
class SplitRows(SharedRows):
    """Rows of a picture of which each process computes a part, from the top down.

    Attributes:
        heights: rows of each, in latent cells; 1 or more.
    """

    heights: tuple[int, ...]
    split: ClassVar[bool] = True

    def largest(self, nbytes: int) -> int:
        return -(-nbytes * max(self.heights) // sum(self.heights))

    def part(self, x: Tensor, dim: int) -> Tensor:
        start, end = (sum(self.heights[:rank]) for rank in (self.axis.rank, self.axis.rank + 1))
        scale = x.shape[dim] // sum(self.heights)
        return x.narrow(dim, scale * start, scale * (end - start))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        scale = x.shape[dim] // self.heights[self.axis.rank]
        missing = scale * max(self.heights) - x.shape[dim]  # all send as many
        parts = self.axis.parts(F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)))
        sizes = (scale * height for height in self.heights)
        return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, sizes, strict=True)], dim)

    def join(self, totals: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.gather(levels, 1)
        if not self.axis.first:  # black, in no memory
            whole = torch.zeros((), dtype=whole.dtype, device="cpu").expand(whole.shape)
        return self.axis.all_reduce(totals), whole

    def pool(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        share = self.heights[self.axis.rank] / sum(self.heights)
        # float64: a mean may be far above the deviation
        first, second = mean.double(), variance.double()
        moments = self.axis.all_reduce(torch.stack([first, second + first.square()]) * share)
        return moments[0].to(mean.dtype), (moments[1] - moments[0].square()).to(mean.dtype)

    def convolve(self, layer: Callable[[Tensor], Tensor], cells: Tensor, stride: int = 1) -> Tensor:
        # rows at a border to a neighbour are computed again, of three, one of which arrives
        # while the layer computes all others
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


def share_rows(mesh: Mesh, video: VideoShape, cell: int) -> SharedRows:
    """Rows of a video over the processes that make it, or all in the first where they are few.

    Args:
        mesh: of the processes.
        video: its size.
        cell: pixels that a latent cell covers on each side.
    """
    axis, rows = mesh.video, video.height // cell
    few = rows < axis.count or video.height * video.width < LEAST_PIXELS * axis.count
    if few or axis.count == 1:
        return SharedRows(axis)
    each, more = divmod(rows, axis.count)
    return SplitRows(axis, tuple(each + (rank < more) for rank in range(axis.count)))
