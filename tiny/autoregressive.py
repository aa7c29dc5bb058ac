"""Recipe of the tiny autoregressive transformers, on clips alone or with their captions.

The text encoder of the second kind is that of the tiny diffusion world, and is not trained here.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from tiny import sizes
from tiny.clips import clip_batches, encode_views, to_device
from tiny.encoders import embed_captions
from tiny.export import export_network, stored_tensors
from tiny.run import EXISTING, TOKENIZER, Run, recipe
from worldline.families.autoregressive.model import ARTransformer, Positions, make_positions
from worldline.families.autoregressive.weights import KEYS, open_network, settings_of
from worldline.losses import next_token_labels, next_token_loss
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.train.loop import Objective, generator
from worldline.train.optim import Rising

_HELD_OUT_TOGETHER = 128  # clips


@recipe(
    TOKENIZER,
    click.option("--text", type=EXISTING, help="Folder of a T5 encoder, for a Video2World model."),
)
def autoregressive(run: Run, tokenizer: Path, text: Path | None) -> None:
    """Train the transformer on the tokens of clips, next token by next token."""
    batch, clips, device = run.batch or 256, run.clips or 150_000, run.device
    coder = open_tokenizer(tokenizer).read(device, run.half)
    encoder = T5Files.open(text).read(device, run.half) if text else None

    def encode(seeds: range, workers: int) -> tuple[Tensor, ...]:
        """Tokens (clips, L), int16, and for a Video2World model the captions' context."""
        tokens, captions = encode_views(
            clip_batches(seeds, sizes.SHAPE, device, workers=workers),
            run.half,
            lambda video: coder.encode_tokens(video).flatten(1).to(torch.int16),
        )
        return (tokens, embed_captions(encoder, captions)) if encoder else (tokens,)

    pool = encode(run.seeds(clips), run.workers)
    held_out = encode(run.held_out(256, clips), 0)
    torch.manual_seed(run.seed)
    config = sizes.VIDEO2WORLD if text else sizes.AUTOREGRESSIVE
    model = run.network(ARTransformer, config, open_network(run.start) if run.start else None)
    positions = make_positions(config, device, torch.float32)
    measure = run.compile(sequence_loss)

    def draw(step: int) -> tuple[Tensor, ...]:
        draws = generator(run.seed, step, rank=run.ranks.rank)
        chosen = torch.randint(len(pool[0]), (batch,), generator=draws)
        return tuple(part[to_device(chosen, device)] for part in pool)

    def loss(*rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with run.mixed_precision():
            return measure(model, positions, *rows), {}

    @torch.no_grad()
    def watch() -> dict[str, Tensor]:
        batches = zip(*(part.split(_HELD_OUT_TOGETHER) for part in held_out), strict=True)
        with run.mixed_precision():
            losses = [sequence_loss(model, positions, *rows) for rows in batches]
        return {"held_out": torch.stack(losses).mean()}

    plan = run.loop(
        20_000,
        3e-3,
        warmup=500,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        orthogonal=("layers.*.weight",),
        average=Rising(0.9995),
    )
    done = run.train(model, Objective(draw=draw, loss=loss, watch=watch, watch_every=500), plan)
    if run.ranks.first:
        tensors, settings = stored_tensors(model, KEYS), settings_of(model.config)
        export_network(tensors, settings, run.folder / "export")
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
    return next_token_loss(logits[:, :-1], next_token_labels(tokens, num_conditioning - 1))
