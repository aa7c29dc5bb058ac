"""What the small diffusion transformers share in training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.models.predict1_dit.model import DiT, Positions
from worldline.models.predict1_dit.weights import released_tensors, write_settings
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.sampling.edm import precondition
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.statistics import LatentStatistics, read_statistics
from worldline.train.loop import LoopConfig, Objective
from worldline.train.tiny import sizes
from worldline.train.tiny.run import Run, half_precision
from worldline.weights.write import save as save_tensors

_HELD_OUT_BATCHES = 8


def train_denoiser(
    run: Run,
    model: nn.Module,
    draw: Callable[[int], tuple[Tensor, ...]],
    draw_held_out: Callable[[int], tuple[Tensor, ...]],
    export: Callable[[Path], None],
) -> None:
    """Train a model, let it be written, and tell its held-out loss.

    Args:
        run: how.
        model: its `transformer` is a DiT; called with a batch it returns the loss of each clip.
        draw: step -> a batch.
        draw_held_out: number -> a batch of clips that are held out.
        export: writes the trained model below a folder.
    """
    measure = run.compiled_if_asked(
        functools.partial(rounded_to, half_precision(run.device), model)
    )

    def loss(*drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return measure(*drawn).mean(), {}

    def watch() -> dict[str, Tensor]:
        # with gradients, as in training: a compiled network then serves both
        parts = [loss(*draw_held_out(number))[0].detach() for number in range(_HELD_OUT_BATCHES)]
        return {"held_out": torch.stack(parts).mean()}

    config = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 4e-3,
        warmup=500,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        orthogonal=("transformer.blocks.*.body.*.weight",),
        average_decay=0.9995,
        graphed=run.graphed,
    )
    done = run.train(model, Objective(draw=draw, loss=loss, watch=watch), config)
    if not run.ranks.first:
        return
    export(run.folder / "export")
    run.tell({"steps": done, "held_out": float(watch()["held_out"])})


def scales_of(folder: Path) -> LatentStatistics:
    """Return the statistics of a continuous tokenizer.

    Raises:
        CheckpointError: its folder holds none.
    """
    statistics = read_statistics(folder)
    if statistics is None:
        raise CheckpointError(f"{folder} holds no statistics of latents")
    return statistics


def export_transformer(transformer: DiT, folder: Path, **settings: Any) -> None:
    """Write weights in bf16 under the released names, and config.json with further settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.bfloat16() for name, t in released_tensors(transformer).items()}
    save_tensors(tensors, folder / "model.safetensors")
    said = json.dumps({**write_settings(transformer.config), **settings}, indent=1)
    (folder / "config.json").write_text(said + "\n")


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
