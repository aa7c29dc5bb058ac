"""Free memory of host and device; imports torch only to ask a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Memory:
    """Bytes of host or device memory."""

    free: int
    total: int


def host_memory() -> Memory | None:
    """Memory of this machine that a process may take; None if it is unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    free = total
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # macOS has no such file: the total is the best that is known
    limit, used = _container_limit()
    if limit is not None and limit < total:
        return Memory(min(free, max(0, limit - used)), limit)
    return Memory(free, total)


def _container_limit() -> tuple[int | None, int]:
    """Limit of a container, and its use without the file cache; None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        held = int((root / "memory.current").read_text())
        for line in (root / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                held -= int(line.split()[1])
    except (OSError, ValueError):  # no container, or "max": no limit
        return None, 0
    return limit, held


def device_memory(device: torch.device) -> Memory | None:
    """Memory of `device`; the host's for a CPU."""
    import torch

    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    return host_memory()
