"""How processes share the training of a network: tensor parallel layers, rows of all weights.

Weights become distributed tensors of torch. The layers of a tensor-parallel part talk as the plan
of inference states (`parallel.tensor.ShardPlan`), with gradients; on top of it each process of
`dp` holds a share of every weight, in the precision of the optimizer, and gathers a block at a time
in that of the computation (FSDP, arXiv 2304.11277).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

from worldline.parallel.tensor import ShardPlan
from worldline.weights.keymap import matches


@dataclass(frozen=True)
class Sharded:
    """A module whose training processes share.

    Attributes:
        module: it, with distributed tensors for parameters.
        mesh: of axes `dp` and `tp`.
        cut: parameters of which each tensor-parallel process holds a part, and the axis of it.
        partial: names of parameters of which each computes a part of the gradient.
    """

    module: nn.Module
    mesh: DeviceMesh
    cut: Mapping[str, int]
    partial: frozenset[str]

    def sum_partial_gradients(self) -> None:
        """Complete gradients of weights that act on a process's own heads alone."""
        group = self.mesh["tp"].get_group()
        for name, parameter in self.module.named_parameters():
            if name in self.partial and parameter.grad is not None:
                torch.distributed.all_reduce(local(parameter.grad), group=group)

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of all processes, float32, ()."""
        gradients: tuple[list[Tensor], list[Tensor]] = [], []  # of whole parameters, of parts
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                gradients[name in self.cut].append(local(parameter.grad))
        squares = torch.zeros(2, device=next(self.module.parameters()).device)
        for square, each in zip(squares, gradients, strict=True):
            if each:  # in few launches: a network has hundreds of parameters
                norms = torch._foreach_norm(each, dtype=torch.float32)
                square.copy_(torch.stack(norms).square().sum())
        whole, parts = squares[:1], squares[1:]
        torch.distributed.all_reduce(parts, group=self.mesh["tp"].get_group())
        total = whole + parts
        torch.distributed.all_reduce(total, group=self.mesh["dp"].get_group())
        return total[0].sqrt()

    def clip(self, most: float) -> Tensor:
        """Scale gradients down to a norm of `most`; their norm before."""
        norm = self.gradient_norm()
        factor = (most / (norm + 1e-6)).clamp_max(1)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
        return norm


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, part: Tensor) -> None:
    """Copy this process's rows of a tensor-parallel part, as `fully_shard` deals them."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh["dp"]
        rows = part.chunk(mesh.size())
        rank = mesh.get_local_rank()
        part = rows[rank] if rank < len(rows) else part[:0]
    local(target).copy_(part)


def share_layers(
    network: nn.Module, plan: ShardPlan, whole: Mapping[str, Sequence[int]], mesh: DeviceMesh
) -> dict[str, int]:
    """Make a tensor-parallel part compute the whole network, with gradients.

    Args:
        network: a part, as `Network.part` has it, with its weights.
        plan: of its class.
        whole: shapes of the whole network's parameters.
        mesh: of the axis `tp`.

    Returns:
        Names of parameters that are cut, and the axis of it.
    """
    # which warns, in every process, of the two gathers of a weight that is cut twice
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    cut: dict[str, int] = {}
    for path, layer in network.named_modules():
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            key = f"{path}.{name}" if path else name
            axes = [a for a, n in enumerate(parameter.shape) if n != whole[key][a]]
            if not axes:
                continue
            shard = DTensor.from_local(parameter.detach(), mesh, [Shard(axes[0])])
            setattr(layer, name, nn.Parameter(shard, parameter.requires_grad))
            cut[key] = axes[0]
        if f"{path}.weight" in cut:
            ways = [way for pattern, way in plan.joined.items() if fnmatchcase(path, pattern)]
            source = Shard(-1) if ways == ["sum"] else Replicate()
            leave: Any = partial(_leave, bool(ways))
            distribute_module(layer, mesh, None, partial(_enter, source), leave)
    return cut


def _enter(source: Any, _: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(x, mesh, [source], run_check=False) for x in inputs)


def _leave(joined: bool, _: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    """A layer's output: whole, or this process's heads or channels."""
    if joined:
        output = output.redistribute(mesh, [Replicate()])
    value: Tensor = output.to_local()
    return value


def shard_weights(
    module: nn.Module, mesh: DeviceMesh, units: Sequence[nn.Module], compute: torch.dtype
) -> None:
    """Spread the weights of a module over the processes of `dp`.

    Args:
        module: its `forward` is what is called; weights are of the optimizer's precision.
        mesh: of the axis `dp`.
        units: modules in it whose weights are gathered when they are called.
        compute: precision of the gathered weights.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # nothing here works in place on what a block returns while gradients are wanted
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
        if hasattr(unit, "encode"):  # of cross-attention: a text is encoded before the blocks run
            register_fsdp_forward_method(unit, "encode")
    if hasattr(module, "predict"):
        register_fsdp_forward_method(module, "predict")


def share(
    module: nn.Module,
    name: str,
    mesh: DeviceMesh,
    *,
    blocks: str,
    compute: torch.dtype,
    whole: Mapping[str, Sequence[int]] = MappingProxyType({}),
    plan: ShardPlan | None = None,
) -> Sharded:
    """Share the training of a module, which holds a network.

    Args:
        module: as for `shard_weights`.
        name: of the network in it; it is a tensor-parallel part where `tp` has several processes.
        mesh: of the axes `dp` and `tp`.
        blocks: name of the network's list of blocks.
        compute: precision of the computation.
        whole: shapes of the whole network's parameters.
        plan: of its class; None where it is not tensor parallel.
    """
    network = module.get_submodule(name)
    cut, parts = dict[str, int](), frozenset[str]()
    if plan is not None and mesh["tp"].size() > 1:
        cut = share_layers(network, plan, whole, mesh["tp"])
        parts = frozenset(f"{name}.{k}" for k in whole if matches(k, plan.partial))
    units: list[nn.Module] = []
    for block in network.get_submodule(blocks).children():
        texts = [m for n, m in block.named_modules() if n.startswith("cross_attention")]
        units += [*(each for each in texts if hasattr(each, "encode")), block]
    shard_weights(module, mesh["dp"], units, compute)
    return Sharded(module, mesh, {f"{name}.{key}": axis for key, axis in cut.items()}, parts)
