"""What the benchmarks of the diffusion models share: released sizes, the work, random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldline.nn.dit import DiTSizes
from worldline.shapes import LatentShape

GRID = LatentShape(16, 88, 160)  # of 121 frames of 704 x 1280: 56,320 tokens
ROWS = 512  # of the text
GEMM_FLOPS = 790e12  # a second: measured best of large bf16 products on an H200


def flops(config: DiTSizes, grid: LatentShape = GRID) -> float:
    """Of one forward, two for each multiplication; the context's keys and values left out."""
    tokens, width = config.tokens(grid).tokens, config.width
    linear = 2 * tokens * width * (6 * width + 2 * config.hidden)
    scores = 4 * tokens * width * (tokens + ROWS)
    return config.depth * (linear + scores)


def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model of the meta device random bf16 weights on `device`."""
    model.to(torch.bfloat16).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            torch.nn.init.ones_(parameter.data)
        else:
            # a little below unit gain, so that activations stay within bf16's reach
            torch.nn.init.normal_(parameter.data, std=0.7 * parameter.shape[-1] ** -0.5)
    model.requires_grad_(False).eval()


def gap(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Return the root mean square of the difference over that of the value, and the value's."""
    difference = (ours.float() - theirs.float()).square().mean().sqrt()
    size = theirs.float().square().mean().sqrt()
    return {"relative_rms": float(difference / size), "rms": float(size)}
