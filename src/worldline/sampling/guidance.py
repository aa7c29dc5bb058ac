"""Classifier-free guidance (arXiv 2207.12598): away from the branch without the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def check_guidance(scale: float) -> None:
    """Raise ValueError unless `scale` is a number that guidance can use."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance {scale} is not a finite number")


def guided(branch: Callable[[bool], Tensor], scale: float) -> Tensor:
    """Return cond + scale * (cond - uncond), in float32.

    This scale is one less than in the more usual uncond + s * (cond - uncond). At 0 the branch
    without the prompt has no weight, so it is not computed.

    Args:
        branch: gives the output with the prompt (True) or without (False), any floating dtype.
        scale: 0 or more in practice; -1 is the branch without the prompt alone.
    """
    conditional = branch(True).float()  # float32: the difference of two near bf16 values is coarse
    if scale == 0:
        return conditional
    return conditional + scale * (conditional - branch(False).float())
