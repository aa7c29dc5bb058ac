"""Training of the tiny autoregressive transformers, on clips alone or with their captions.

The text encoder of the second kind is that of the tiny diffusion world, and is not trained here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tiny import sizes
from tiny.clips import clip_batches, encode_views, to_device
from tiny.export import autoregressive_settings, draw_weights, stored_tensors
from tiny.run import Run, embed_captions, half_precision, mixed_precision
from worldline.families.autoregressive.model import (
    ARTransformer,
    Positions,
    make_positions,
)
from worldline.families.autoregressive.weights import KEYS
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.train.losses import next_token_labels, next_token_loss
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save

_HELD_OUT_TOGETHER = 128  # clips


class Sequences(NamedTuple):
    """Clips as they are trained on, on the device.

    Attributes:
        tokens: (clips, L) int16.
        context: (clips, S, E) of the captions; None for a base model.
    """

    tokens: Tensor
    context: Tensor | None

    def rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Tokens, and context if there is any, of some clips."""
        return tuple(part[rows] for part in (self.tokens, self.context) if part is not None)


def train_autoregressive(
    run: Run, tokenizer_folder: Path, text_folder: Path | None, start: Path | None
) -> None:
    """Train on the tokens of clips; with a T5 encoder, conditioned on captions (Video2World)."""
    batch, clips, device = run.batch or 256, run.clips or 150_000, run.device
    half = half_precision(device)
    config = sizes.AUTOREGRESSIVE if text_folder is None else sizes.VIDEO2WORLD
    tokenizer = open_tokenizer(tokenizer_folder).read(device, half)
    text = None if text_folder is None else T5Files.open(text_folder).load(device, half)

    def encode(seeds: range, workers: int) -> Sequences:
        tokens, captions = encode_views(
            clip_batches(seeds, sizes.SHAPE, device, workers=workers),
            half,
            lambda video: tokenizer.encode_tokens(video).flatten(1).to(torch.int16),
        )
        return Sequences(tokens, None if text is None else embed_captions(text, captions))

    pool = encode(run.seeds(clips), run.workers)
    held_out = encode(run.held_out(256, clips), 0)
    torch.manual_seed(run.seed)
    if start is None:
        model = ARTransformer(config)
        draw_weights(model)
        model = model.to(device)
    else:
        with torch.device("meta"):
            model = ARTransformer(config)
        source = open_checkpoint(start / "model.safetensors")
        load_into(model, source, KEYS, device=device, dtype=torch.float32)
    positions = make_positions(config, device, torch.float32)
    measure = run.compile(sequence_loss)

    def draw(step: int) -> tuple[Tensor, ...]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(pool.tokens), (batch,), generator=draws)
        return pool.rows(to_device(chosen, device))

    def loss(*rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(device):
            return measure(model, positions, *rows), {}

    @torch.no_grad()
    def watch() -> dict[str, Tensor]:
        parts = torch.arange(len(held_out.tokens), device=device).split(_HELD_OUT_TOGETHER)
        with mixed_precision(device):
            losses = [sequence_loss(model, positions, *held_out.rows(part)) for part in parts]
        return {"held_out": torch.stack(losses).mean()}

    plan = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 3e-3,
        warmup=500,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        orthogonal=("layers.*.weight",),
        average_decay=0.9995,
        graphed=run.graphed,
    )
    objective = Objective(draw=draw, loss=loss, watch=watch, watch_every=500)
    done = run.train(model, objective, plan)
    if run.ranks.first:
        export_autoregressive(model, run.folder / "export")
        run.report({"steps": done, "held_out": float(watch()["held_out"])})


def sequence_loss(
    model: ARTransformer, positions: Positions, tokens: Tensor, context: Tensor | None = None
) -> Tensor:
    """Mean loss of whole clips but for their first latent frame, a conditioning frame.

    Tokens are (B, L) of any integer dtype; context is (B, S, E), of Video2World models only.
    """
    config = model.config
    if config.leading_tokens:
        begin = tokens.new_full((len(tokens), config.leading_tokens), config.begin_token)
        tokens = torch.cat([begin, tokens], dim=1)
    tokens = tokens.long()
    encoded = None if context is None else model.encode_context(context)
    logits = model(tokens, positions, context=encoded)
    num_conditioning = config.grid.tokens_per_frame + config.leading_tokens
    labels = next_token_labels(tokens, num_conditioning - 1)
    return next_token_loss(logits[:, :-1], labels).total


def export_autoregressive(model: ARTransformer, folder: Path) -> None:
    """Write weights in bf16 under the released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(model, KEYS)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(autoregressive_settings(model.config), indent=1) + "\n"
    )
