"""What the small transformers that denoise latents share in training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiny import sizes
from tiny.data import captioned_batches, encode_captioned, to_device
from tiny.run import Run, half_precision
from worldline.errors import CheckpointError
from worldline.families.diffusion.model import DiT, Positions
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.sampling.edm import precondition
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import LatentStatistics
from worldline.tokenizers.cosmos.weights import read_statistics
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.weights.write import save as save_tensors

_HELD_OUT_BATCHES = 8
# Shares of clips with no known latent frame, one (an image), or two: less given, more to learn.
_KNOWN = (0.5, 0.2, 0.3)
_TEXT_DROPPED = 0.1


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
        model: its `transformer` is a DiT of either kind; called with a batch it returns the loss of
            each clip.
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


class Captioned(NamedTuple):
    """Clips as they are trained on, each as drawn and mirrored; the texts lie on the CPU.

    Attributes:
        latents: (clips, C, t, h, w), bf16.
        texts: each (clips, S): ids, and the mask of tokens where the encoder takes one.
    """

    latents: Tensor
    texts: tuple[Tensor, ...]


def encode_clips(
    run: Run,
    seeds: range,
    workers: int,
    encode: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], tuple[Tensor, ...]],
) -> Captioned:
    """Return generated clips with their captions.

    Args:
        run: how.
        seeds: of the clips.
        workers: processes that draw them.
        encode: video (B, 3, T, H, W) to latents as they are trained on.
        tokenize: captions to what the text encoder takes.
    """
    batches = captioned_batches(seeds, sizes.SHAPE, run.device, workers=workers)
    latents, captions = encode_captioned(
        batches, half_precision(run.device), lambda video: encode(video).bfloat16()
    )
    return Captioned(latents, tokenize(captions))


class Drawn(NamedTuple):
    """A batch without its noise, on the device.

    Attributes:
        latents: (B, C, t, h, w), float32.
        texts: as in `Captioned`.
        known: (B,) number of latent frames that are known.
        normal: (B,) unit normal, to make noise levels of.
    """

    latents: Tensor
    texts: tuple[Tensor, ...]
    known: Tensor
    normal: Tensor


def draw_clips(
    run: Run, given: Captioned, silent: tuple[Tensor, ...], step: int, batch: int
) -> Drawn:
    """Return the clips of a step, some without their text.

    Args:
        run: how.
        given: to draw from.
        silent: texts that say nothing of a clip, as in `Captioned`.
        step: number of the batch.
        batch: B.
    """
    draws = generator(run.seed, step, rank=run.ranks.rank)
    chosen = torch.randint(len(given.latents), (batch,), generator=draws)
    dropped = torch.rand(batch, generator=draws) < _TEXT_DROPPED
    other = torch.randint(len(silent[0]), (batch,), generator=draws)
    known = torch.multinomial(torch.tensor(_KNOWN), batch, replacement=True, generator=draws)
    normal = torch.randn(batch, generator=draws)
    texts = []
    for told, nothing in zip(given.texts, silent, strict=True):
        rows = torch.where(dropped[:, None], nothing[other], told[chosen])
        texts.append(to_device(rows, run.device))
    chosen, known, normal = (to_device(values, run.device) for values in (chosen, known, normal))
    return Drawn(given.latents[chosen].float(), tuple(texts), known, normal)


def draw_noise(run: Run, step: int, *shape: int) -> Tensor:
    """Return the unit normal noise of a step, on the device."""
    draws = generator(run.seed, step, run.device, rank=run.ranks.rank)
    return torch.randn(shape, generator=draws, device=run.device)


def scales_of(folder: Path) -> LatentStatistics:
    """Return the statistics of a continuous tokenizer.

    Raises:
        CheckpointError: its folder holds none.
    """
    statistics = open_tokenizer(folder).statistics
    if statistics is None:
        raise CheckpointError(f"{folder} holds no statistics of latents")
    return statistics


def export_transformer(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path
) -> None:
    """Write tensors in bf16 under their released names, and what config.json says beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_tensors(halves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


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
