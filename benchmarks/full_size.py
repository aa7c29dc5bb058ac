"""What the benchmarks of the diffusion models share: the released size, and the work it takes."""

from __future__ import annotations

from worldline.models.predict1_dit.model import DiTConfig
from worldline.shapes import LatentShape

GRID = LatentShape(16, 88, 160)  # of 121 frames of 704 x 1280: 56,320 tokens
ROWS = 512  # of the text
GEMM_FLOPS = 790e12  # a second: measured best of large bf16 products on an H200


def flops(config: DiTConfig) -> float:
    """Of one forward, two for each multiplication; the context's keys and values left out."""
    tokens, width = config.tokens(GRID).tokens, config.width
    linear = 2 * tokens * width * (6 * width + 2 * config.hidden)
    scores = 4 * tokens * width * (tokens + ROWS)
    return config.depth * (linear + scores)
