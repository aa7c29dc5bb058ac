"""The decoding kernels in torch, with which the captured step runs on a CPU, without a graph."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import worldline.nn
import worldline.parallel
from worldline.families.autoregressive.step import CapturedDecoder
from worldline.nn.attention import attend
from worldline.nn.rope import Rotation, rotate


class Eager(CapturedDecoder):
    """The captured decoder, whose step is run anew for each token."""

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        if self.done == self.cache.length:
            self._forget()
        self.position.fill_(self.done - 1)
        if noise is not None:
            self.noise.copy_(noise)
        self.run()
        self.done += 1


def norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gamma.shape, gamma, eps)


def matvec(x: Tensor, weights: Any, out: Tensor, **options: Any) -> Tensor:
    if options.get("gamma") is not None:
        x = norm(x, options["gamma"], options["eps"])
    y = torch.cat([F.linear(x, weight) for weight in weights], -1)
    residual = options.get("residual")
    return out.copy_(y if residual is None else y + residual)


def gate_up(x: Tensor, weights: Any, out: Tensor, **options: Any) -> Tensor:
    if options.get("gamma") is not None:
        x = norm(x, options["gamma"], options["eps"])
    return out.copy_(F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1]))


def add_and_normalise(
    addends: Tensor, stream: Tensor | None, gamma: Tensor, eps: float, **options: Any
) -> tuple[Tensor, Tensor]:
    total = addends.sum(0) if stream is None else addends.sum(0) + stream
    if options["added"] is not None:
        total += options["added"]
    return total, norm(total.to(gamma.dtype), gamma, eps)


class Attend:
    def __init__(self, **sizes: Any) -> None:
        self.heads, self.key_heads = sizes["num_heads"], sizes["num_kv_heads"]

    def __call__(
        self,
        qkv: Tensor,
        gammas: Any,
        eps: float,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        **at: Any,
    ) -> Tensor:
        heads = qkv.unflatten(-1, (-1, keys.shape[-1]))[:, :, None]  # (B, heads, 1, K)
        q = norm(heads[:, : self.heads], gammas[0], eps)
        if (position := at.get("position")) is not None:
            k, v = heads[:, self.heads :].split(self.key_heads, 1)
            here = slice(int(position), int(position) + 1)
            rotation = Rotation(*(table[here] for table in at["rotation"]))
            q = rotate(q, rotation)
            keys[:, :, here] = rotate(norm(k, gammas[1], eps), rotation)
            values[:, :, here] = v
            keys, values = keys[:, :, : here.stop], values[:, :, : here.stop]
        return out.copy_(attend(q, keys, values).flatten(1))


def replace_kernels(patch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(
        matvec=matvec,
        gate_up=gate_up,
        Attend=Attend,
    )
    patch.setitem(sys.modules, "worldline.nn.decode_kernels", kernels)
    patch.setattr(worldline.nn, "decode_kernels", kernels, raising=False)
    added = SimpleNamespace(add_and_normalise=add_and_normalise)
    patch.setitem(sys.modules, "worldline.parallel.sum_kernel", added)
    patch.setattr(worldline.parallel, "sum_kernel", added, raising=False)
