"""Context parallel denoising: processes share the tokens of a clip.

Each process has an equal part of every latent frame's tokens, so that noise levels that differ from
frame to frame stay equal runs, and however many frames there are. All layers work on a process's
own tokens; self-attention alone needs those of the others:

- Ulysses (arXiv 2309.14509): every process gets all tokens of its part of the heads, by one
  all-to-all of queries, keys and values, and gives the result back by another.
- Ring attention (arXiv 2310.01889), for any number of heads: keys and values pass from process to
  process, while each attends to those that have arrived; partial results are joined.

Parts need not be equal: nothing is padded on the way, so no attention sees padding.
Axes: B batch, T latent frames, L tokens, l tokens of this process, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.nn.attention import attend, attend_partially
from worldline.nn.dit import ALL_TOKENS, Tokens
from worldline.parallel.mesh import Axis
from worldline.shapes import LatentShape

Way = Literal["auto", "ulysses", "ring"]


@dataclass(frozen=True)
class SplitTokens(Tokens):
    """Tokens of a clip that processes share.

    Attributes:
        axis: the processes.
        frames: T.
        counts: tokens of a frame that each process has; 1 or more.
        ring: whether keys and values are passed on, or heads are split.
        scratch: of the ring, two blocks of keys and values by dtype and device.
    """

    axis: Axis
    frames: int
    counts: tuple[int, ...]
    ring: bool
    scratch: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        kind = "GPUs" if self.axis.device.type == "cuda" else "processes"
        return f"{'ring attention' if self.ring else 'Ulysses'} over {self.axis.count} {kind}"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each process."""
        return [self.frames * count for count in self.counts]

    @property
    def exchanged(self) -> int:  # type: ignore[override]
        """Ulysses: queries, keys and values twice; ring: two blocks, which stay, and results."""
        return 8 if self.ring else 4

    def num_rows(self, count: int) -> int:
        return max(self.lengths)

    def num_queries(self, count: int) -> int:
        return max(self.lengths) if self.ring else count

    def part(self, x: Tensor) -> Tensor:
        frames = x.unflatten(-2, (self.frames, -1))
        return frames.split(self.counts, dim=-2)[self.axis.rank].flatten(-3, -2)

    def join(self, y: Tensor) -> Tensor:
        frames, most = y.unflatten(1, (self.frames, -1)), max(self.counts)
        parts = self.axis.parts(F.pad(frames, (0, 0, 0, most - frames.shape[2])))
        cut = [part[:, :, :count] for part, count in zip(parts, self.counts, strict=True)]
        return torch.cat(cut, dim=2).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` of this process's queries (B, N, l, K) to the keys of all tokens."""
        return self._pass_round(q, k, v) if self.ring else self._split_heads(q, k, v)

    def _split_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        count, lengths = self.axis.count, self.lengths
        # tokens come first, those of a process together: what arrives are heads of all tokens, with
        # strides that attention reads as they are
        sent = q.new_empty(count, length, batch, 3, heads // count, size)
        for place, x in zip(sent.unbind(3), (q, k, v), strict=True):
            place.copy_(x.unflatten(1, (count, -1)).permute(1, 3, 0, 2, 4))
        arrived = self.axis.all_to_all(sent.flatten(0, 1), [length] * count, lengths)
        del sent, place
        y = attend(*(x.permute(1, 2, 0, 3) for x in arrived.unbind(2)))
        back = self.axis.all_to_all(y.permute(2, 0, 1, 3), lengths, [length] * count)
        heads_last = back.unflatten(0, (count, length)).permute(2, 1, 0, 3, 4)
        return heads_last.flatten(2, 3).transpose(1, 2)

    def _pass_round(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # float32 until all parts are joined: each would round the result anew
        result = sums = q.new_empty(0)
        for block in self._blocks(k.transpose(1, 2), v.transpose(1, 2)):
            part, part_sums = attend_partially(q, *block.transpose(2, 3))
            part = part.to(part_sums.dtype)
            if sums.numel():
                part = result.lerp_(part, (part_sums - sums).sigmoid().unsqueeze(-1))
                part_sums = torch.logaddexp(sums, part_sums)
            result, sums = part, part_sums
        return result.to(q.dtype)

    def _blocks(self, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        """Keys and values (2, B, l, N, K) of each process, those (B, l, N, K) of this one first.

        The next ones travel while a block is used. All layers take turns at two blocks: NCCL holds
        what it has sent or filled until the GPU is there, and a CPU runs many layers ahead.
        """
        lengths, rank, (batch, _, *head) = self.lengths, self.axis.rank, k.shape
        size = 2 * batch * max(lengths) * prod(head)
        key = k.dtype, k.device, size
        if key not in self.scratch:
            self.scratch[key] = k.new_empty(2, size)
        places = cycle(self.scratch[key])

        def place(length: int) -> Tensor:
            shape = (2, batch, length, *head)
            return next(places)[: prod(shape)].view(shape)

        block = torch.stack([k, v], out=place(lengths[rank]))
        for length in (lengths[rank - step] for step in range(1, self.axis.count)):
            arriving = place(length)
            wait = self.axis.pass_on(block, arriving)
            yield block
            wait()
            block = arriving
        yield block


def split_tokens(axis: Axis, grid: LatentShape, num_heads: int, way: Way) -> Tokens:
    """A clip's tokens as the processes of an axis share them.

    Args:
        axis: the processes; where a frame has fewer tokens, each has all.
        grid: of tokens.
        num_heads: of self-attention; where they cannot be split, the way is the ring.
        way: "auto" splits heads where possible, for two exchanges cost less than a ring.
    """
    cells, count = grid.height * grid.width, axis.count
    if not 1 < count <= cells:
        return ALL_TOKENS
    ends = [cells * rank // count for rank in range(count + 1)]
    counts = tuple(end - start for start, end in pairwise(ends))
    return SplitTokens(axis, grid.frames, counts, way == "ring" or num_heads % count != 0)
