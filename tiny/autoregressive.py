"""Training of the small autoregressive transformers: of clips alone, or with their captions.

The text encoder of the second kind is that of the small diffusion world, and is not trained here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tiny import sizes
from tiny.data import captioned_batches, encode_captioned, to_device
from tiny.run import Run, embed_captions, half_precision, mixed_precision
from tiny.export import autoregressive_settings, draw_weights, stored_tensors
from worldline.families.autoregressive.model import (
    ARTransformer,
    Positions,
    make_positions,
)
from worldline.families.autoregressive.weights import KEYS
from worldline.text.t5 import T5Encoder, T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.train.losses import next_token_labels, next_token_loss
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save

_HELD_OUT_TOGETHER = 128  # clips


def train_autoregressive(
    run: Run, tokenizer_folder: Path, text_folder: Path | None, start: Path | None
) -> None:
    """Train on the tokens of generated clips, next token by next token.

    Args:
        run: how.
        tokenizer_folder: an export folder.
        text_folder: of a T5 encoder: the model is conditioned on captions (Video2World); None for
            a base model.
        start: weights to begin with, an export folder.
    """
    batch, clips, device = run.batch or 256, run.clips or 150_000, run.device
    half = half_precision(device)
    config = sizes.AUTOREGRESSIVE if text_folder is None else sizes.VIDEO2WORLD
    coder = open_tokenizer(tokenizer_folder).read(device, half)
    text = None if text_folder is None else T5Files.open(text_folder).load(device, half)

    def encoded(seeds: range, workers: int) -> _Sequences:
        return encode_sequences(run, coder, text, seeds, workers)

    pool = encoded(run.share(range(clips)), run.workers)
    aside = encoded(range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, 256)), 0)
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
    measure = run.compiled_if_asked(sequence_loss)

    def draw(step: int) -> tuple[Tensor, ...]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(pool.tokens), (batch,), generator=draws)
        return pool.rows(to_device(chosen, device))

    def loss(*rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(device):
            return measure(model, positions, *rows), {}

    @torch.no_grad()
    def watch() -> dict[str, Tensor]:
        parts = torch.arange(len(aside.tokens), device=device).split(_HELD_OUT_TOGETHER)
        with mixed_precision(device):
            losses = [sequence_loss(model, positions, *aside.rows(part)) for part in parts]
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
    if not run.ranks.first:
        return
    export_autoregressive(model, run.folder / "export")
    run.tell({"steps": done, "held_out": float(watch()["held_out"])})


class _Sequences(NamedTuple):
    """Clips as they are trained on.

    Attributes:
        tokens: (clips, L) int16, on the device.
        context: (clips, S, E) of the captions; None for a base model.
    """

    tokens: Tensor
    context: Tensor | None

    def rows(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Return what `sequence_loss` takes of these clips."""
        if self.context is None:
            return (self.tokens[chosen],)
        return self.tokens[chosen], self.context[chosen]


@torch.no_grad()
def encode_sequences(
    run: Run, coder: CosmosTokenizer, text: T5Encoder | None, seeds: range, workers: int
) -> _Sequences:
    """Return the tokens of clips, each as drawn and mirrored, and their captions' embeddings."""
    half = half_precision(run.device)
    batches = captioned_batches(seeds, sizes.SHAPE, run.device, workers=workers)
    tokens, captions = encode_captioned(
        batches, half, lambda video: coder.encode_tokens(video).flatten(1).to(torch.int16)
    )
    if text is None:
        return _Sequences(tokens, None)
    return _Sequences(tokens, embed_captions(text, captions))


def sequence_loss(
    model: ARTransformer, positions: Positions, tokens: Tensor, context: Tensor | None = None
) -> Tensor:
    """Return the mean loss of whole clips, of which the first latent frame is given.

    Args:
        model: of either kind.
        positions: of a whole clip.
        tokens: (B, L), any integer dtype.
        context: (B, S, E) of the captions; Video2World only.
    """
    config = model.config
    given = config.grid.tokens_per_frame + config.leading_tokens
    if config.leading_tokens:
        begun = tokens.new_full((len(tokens), config.leading_tokens), config.begin_token)
        tokens = torch.cat([begun, tokens], dim=1)
    tokens = tokens.long()
    encoded = None if context is None else model.encode_context(context)
    logits = model(tokens, positions, context=encoded)
    labels = next_token_labels(tokens, given - 1)
    return next_token_loss(logits[:, :-1], labels).total


def export_autoregressive(model: ARTransformer, folder: Path) -> None:
    """Write weights in bf16 under the released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(model, KEYS)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(autoregressive_settings(model.config), indent=1) + "\n")
