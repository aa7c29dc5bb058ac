"""The noise a request starts from: a seed is the same noise on any machine and any number of GPUs.

Source: NVIDIA/Cosmos `cosmos1/models/diffusion/diffusion/modules/res_sampler.py` and `misc.py`
(numpy's legacy generator, whose stream is frozen), used here for both generations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldline.choices import MAX_SEED


def standard_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Return unit normal noise of `shape`, float32, on the CPU.

    Raises:
        ValueError: the seed is outside 0 to 2^32 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is outside 0 to {MAX_SEED}")
    drawn = np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(drawn.astype(np.float32))
