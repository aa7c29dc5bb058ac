"""What the small diffusion transformers share in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldline.models.predict1_dit.model import DiT, Positions
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.sampling.edm import precondition
from worldline.shapes import LatentShape
from worldline.train.tiny import sizes


class Places(nn.Module):
    """The positions of all tokens of a clip at the transformer's own frame rate."""

    cos: Tensor
    sin: Tensor

    def __init__(self, transformer: DiT, grid: LatentShape) -> None:
        super().__init__()
        config = transformer.config
        self.tokens = config.tokens(grid)
        angles = stretched_angles_3d(
            self.tokens,
            config.head_size,
            ratio=config.rope_ratio,
            time_scale=(config.base_fps, config.base_fps),
            dtype=getattr(torch, sizes.ROTARY_PRECISION),
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, transformer: DiT) -> Positions:
        """Return them with the learned ones as they are now."""
        learned = transformer.positions
        return Positions(
            Rotation(self.cos, self.sin), None if learned is None else learned(self.tokens)
        )


def told_level(sigma: Tensor) -> Tensor:
    """Return noise levels (B,) as a network in bf16 is told them, float32."""
    return precondition(sigma).noise.bfloat16().float()


def rounded_to(dtype: torch.dtype, model: nn.Module, *given: Tensor) -> Tensor:
    """Return what `model` says with all its weights rounded to `dtype`, as a world runs.

    The gradient goes to the weights themselves.
    """
    rounded = {name: weight.to(dtype) for name, weight in model.named_parameters()}
    # not tied by name: the two names of T5's embedding are of one module, which is swapped once
    said: Tensor = torch.func.functional_call(model, rounded, given, tie_weights=False)
    return said
