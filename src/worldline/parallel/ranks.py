"""Several processes that train one model, each on its own part of a batch.

Started by `torchrun --nproc_per_node=N …`, which numbers them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1  # of processes

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype and device, in place, by their means over all processes."""
        if self.count == 1:
            return
        whole = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in whole])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(whole, flat.split([t.numel() for t in whole]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether `value` is true in any process; all get the same answer."""
        if self.count == 1:
            return value
        flag = torch.tensor(float(value), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


ALONE = Ranks()


def join(device: str) -> tuple[Ranks, str]:
    """Meet the other processes, if any; this one's rank and device.

    "cuda" becomes this process's own GPU; "cuda:1" and "cpu" stay.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)  # a graph is recorded on the current device
        return ALONE, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        dist.init_process_group("gloo")
    return Ranks(int(os.environ["RANK"]), count), device


def leave(ranks: Ranks) -> None:
    """Part from the others, once all have come here."""
    if ranks.count > 1:
        dist.barrier()
        dist.destroy_process_group()
