"""What Triton kernels share; import only where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(place, inside=None):  # type: ignore[no-untyped-def]
    """Numbers in memory as float32; zeros that are not `inside`."""
    if inside is None:
        return tl.load(place).to(tl.float32)
    return tl.load(place, inside, other=0.0).to(tl.float32)
