"""Training of the small autoregressive transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldline.models.predict1_ar.model import ARTransformer, Positions, make_positions
from worldline.models.predict1_ar.weights import KEYS, write_settings
from worldline.tokenizers.cosmos.load import load_tokenizer
from worldline.train.data import encode_pool, physics_batches, to_device
from worldline.train.loop import LoopConfig, Objective, generator
from worldline.train.losses import next_token_labels, next_token_loss
from worldline.train.tiny import sizes
from worldline.train.tiny.run import Run, half_precision, mixed_precision
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save_module


def train_autoregressive(run: Run, tokenizer_folder: Path, start: Path | None) -> None:
    """Train on the tokens of generated clips, next token by next token.

    Args:
        run: how.
        tokenizer_folder: an export folder.
        start: weights to begin with, an export folder.
    """
    batch, clips, device, folder = run.batch or 256, run.clips or 150_000, run.device, run.folder
    half = half_precision(device)
    coder = load_tokenizer(tokenizer_folder, device=device, dtype=half)
    cached = folder / f"tokens-{run.ranks.rank}-of-{run.ranks.count}.pt"
    if cached.exists():
        tokens = torch.load(cached, weights_only=True).to(device)
    else:
        seeds = run.share(range(clips))
        batches = physics_batches(seeds, sizes.SHAPE, device, workers=run.workers)
        tokens = encode_pool(coder, batches, half)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tokens.cpu(), cached)
    aside = range(sizes.HELD_OUT, sizes.HELD_OUT + min(clips, 256))
    held_out = encode_pool(coder, physics_batches(aside, sizes.SHAPE, device), half)
    del coder
    torch.manual_seed(run.seed)
    if start is None:
        model = ARTransformer(sizes.AUTOREGRESSIVE)
        model.reset_parameters()
        model = model.to(device)
    else:
        with torch.device("meta"):
            model = ARTransformer(sizes.AUTOREGRESSIVE)
        source = open_checkpoint(start / "model.safetensors")
        load_into(model, source, KEYS, device=device, dtype=torch.float32)
    positions = make_positions(sizes.AUTOREGRESSIVE, device, torch.float32)
    measure: Any = _next_token_loss
    if run.compiled:
        measure = torch.compile(measure, dynamic=False)

    def draw(step: int) -> tuple[Tensor]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(tokens), (batch,), generator=draws)
        return (tokens[to_device(chosen, device)],)

    def loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(device):
            return measure(model, rows, positions), {}

    @torch.no_grad()
    def watch() -> dict[str, Tensor]:
        with mixed_precision(device):
            parts = [_next_token_loss(model, rows, positions) for rows in held_out.split(128)]
        return {"held_out": torch.stack(parts).mean()}

    config = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 3e-3,
        warmup=500,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        average_decay=0.9995,
        graphed=run.graphed,
    )
    objective = Objective(draw=draw, loss=loss, watch=watch, watch_every=500)
    done = run.train(model, objective, config)
    if not run.ranks.first:
        return
    export_autoregressive(model, folder / "export")
    run.tell({"steps": done, "held_out": float(watch()["held_out"])})


def _next_token_loss(model: ARTransformer, tokens: Tensor, positions: Positions) -> Tensor:
    """Return the mean loss of whole sequences (B, L), any integer dtype."""
    tokens = tokens.long()
    labels = next_token_labels(
        tokens, sizes.AUTOREGRESSIVE.grid.tokens_per_frame - 1
    )  # the first frame is given
    return next_token_loss(model(tokens, positions)[:, :-1], labels).total


def export_autoregressive(model: ARTransformer, folder: Path) -> None:
    """Write weights in bf16 under the released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_module(model, folder / "model.safetensors", keymap=KEYS, dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(write_settings(model.config), indent=1) + "\n")
