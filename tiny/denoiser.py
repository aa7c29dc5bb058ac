"""What the tiny transformers that denoise latents share in training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.clips import clip_batches, encode_views, to_device
from tiny.run import Run
from worldline.errors import CheckpointError
from worldline.families.diffusion.model import DiT, Positions
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.sampling.edm import precondition
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import LatentStatistics
from worldline.tokenizers.cosmos.weights import CosmosNetwork
from worldline.train.loop import Objective, generator
from worldline.train.optim import Rising

# Shares of clips with no conditioning latent frame, one (an image), or two: the fewer, the more
# there is to learn.
NUM_CONDITIONING = (0.5, 0.2, 0.3)
_TEXT_DROPPED = 0.1
_HELD_OUT_BATCHES = 8

Clips = tuple[Tensor, ...]  # encoded clips, a row each in every tensor


def train_denoiser(
    run: Run,
    model: nn.Module,
    pool: Clips,
    held_out: Clips,
    draw: Callable[[Clips, int], tuple[Tensor, ...]],
    export: Callable[[Path], None],
) -> None:
    """Train a model, export it below a folder and report its held-out loss.

    Called with a batch, which `draw` makes of clips and a step, it returns the loss of each clip.
    """
    measure = run.compile(functools.partial(rounded_to, run.half, model))

    def loss(*batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return measure(*batch).mean(), {}

    def watch() -> dict[str, Tensor]:
        # with gradients, as in training: a compiled network then serves both
        batches = (draw(held_out, number) for number in range(_HELD_OUT_BATCHES))
        parts = [loss(*batch)[0].detach() for batch in batches]
        return {"held_out": torch.stack(parts).mean()}

    config = run.loop(
        20_000,
        4e-3,
        warmup=500,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        orthogonal=("transformer.blocks.*.body.*.weight",),
        average=Rising(0.9995),
    )
    objective = Objective(draw=functools.partial(draw, pool), loss=loss, watch=watch)
    done = run.train(model, objective, config)
    if run.ranks.first:
        export(run.folder / "export")
        run.report({"steps": done, "held_out": float(watch()["held_out"])})


def train_captioned(
    run: Run,
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Clips],
    blank: Clips,
    levels: Callable[[Tensor], Tensor],
    export: Callable[[Path], None],
    *,
    noises: tuple[int, ...] = (),
    conditioning: tuple[float, ...] = NUM_CONDITIONING,
    often: tuple[str, ...] = (),
) -> None:
    """Train a model on captioned clips, some with a `blank` text in place of their own.

    It is called with latents (B, C, t, h, w), noise (*noises, B, C, t, h, w), texts (B, S), which
    are ids and perhaps a mask, noise levels (B,), and numbers (B,) of conditioning latent frames.

    Args:
        run: options.
        model: trained in place.
        encode: video (B, 3, T, H, W) in [-1, 1] -> latents.
        tokenize: captions -> texts.
        blank: texts.
        levels: unit normal numbers (B,) -> noise levels.
        export: writes the model below a folder.
        noises: axes in front of the noise.
        conditioning: shares of clips with no conditioning latent frame, with one, ...
        often: words; clips are drawn once more for each of them that their caption has.
    """
    size, num_clips = run.batch or 256, run.clips or 80_000

    def encode_clips(seeds: range, workers: int) -> Clips:
        """Latents (clips, C, t, h, w), bf16, and on the CPU texts, as drawn and mirrored.

        With `often` there are weights (clips,) by which they are drawn, the last.
        """
        batches = clip_batches(seeds, sizes.SHAPE, run.device, workers=workers)
        latents, captions = encode_views(batches, run.half, lambda video: encode(video).bfloat16())
        weights = [1.0 + sum(word in caption for word in often) for caption in captions]
        return latents, *tokenize(captions), *([torch.tensor(weights)] if often else ())

    def draw(clips: Clips, step: int) -> tuple[Tensor, ...]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        latents, texts, weights = clips[0], clips[1 : 1 + len(blank)], clips[1 + len(blank) :]
        if weights:
            chosen = torch.multinomial(weights[0], size, replacement=True, generator=draws)
        else:
            chosen = torch.randint(len(latents), (size,), generator=draws)
        dropped = torch.rand(size, generator=draws) < _TEXT_DROPPED
        other = torch.randint(len(blank[0]), (size,), generator=draws)
        shares = torch.tensor(conditioning)
        count = torch.multinomial(shares, size, replacement=True, generator=draws)
        sigma = levels(torch.randn(size, generator=draws))
        read = [
            torch.where(dropped[:, None], nothing[other], text[chosen])
            for text, nothing in zip(texts, blank, strict=True)
        ]
        chosen, *others = (to_device(t, run.device) for t in (chosen, *read, sigma, count))
        latents = latents[chosen].float()
        return latents, draw_noise(run, step, *noises, *latents.shape), *others

    pool = encode_clips(run.seeds(num_clips), run.workers)
    held_out = encode_clips(run.held_out(256, num_clips), 0)[: 1 + len(blank)]  # all as often
    train_denoiser(run, model, pool, held_out, draw, export)


def draw_noise(run: Run, step: int, *shape: int) -> Tensor:
    """Unit normal noise of a step, on the device."""
    draws = generator(run.seed, step, run.device, rank=run.ranks.rank)
    return torch.randn(shape, generator=draws, device=run.device)


def latent_scales(tokenizer: CosmosNetwork) -> LatentStatistics:
    """Statistics of a continuous tokenizer; CheckpointError where its folder holds none."""
    if tokenizer.statistics is None:
        raise CheckpointError(f"{tokenizer.path} holds no statistics of latents")
    return tokenizer.statistics


class ClipPositions(nn.Module):
    """Positions of all tokens of a clip at the transformer's own frame rate."""

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
        """Rotations, and the learned positions as they are now."""
        learned = transformer.positions
        return Positions(
            Rotation(self.cos, self.sin), None if learned is None else learned(self.tokens)
        )


def noise_times(sigma: Tensor) -> Tensor:
    """Noise levels (B,) as a network in bf16 takes them, float32."""
    return precondition(sigma).noise.bfloat16().float()


def rounded_to(dtype: torch.dtype, model: nn.Module, *batch: Tensor) -> Tensor:
    """The model's output with all its weights rounded to `dtype`, as a world runs.

    The gradient goes to the weights themselves.
    """
    rounded = {name: weight.to(dtype) for name, weight in model.named_parameters()}
    # not tied by name: the two names of T5's embedding are of one module, which is swapped once
    output: Tensor = torch.func.functional_call(model, rounded, batch, tie_weights=False)
    return output
