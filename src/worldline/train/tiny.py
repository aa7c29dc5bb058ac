"""Train the small worlds that ship with the package, in segments that a kill cannot spoil.

    python -m worldline.train.tiny tokenizer --folder runs/tokenizer --seconds 540
    python -m worldline.train.tiny autoregressive --folder runs/ar --tokenizer runs/tokenizer/export

Each call goes on where the last one stopped. The networks, losses and file layouts are those of the
released models; only the sizes are small.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from worldline.models.predict1_ar.model import (
    ARTransformer,
    ARTransformerConfig,
    Positions,
    make_positions,
)
from worldline.models.predict1_ar.weights import KEYS, write_settings
from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos import weights as tokenizer_weights
from worldline.tokenizers.cosmos.load import load_tokenizer
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.train.data import ClipPool, as_video, encode_pool, physics_batches, to_device
from worldline.train.loop import LoopConfig, fit, generator
from worldline.train.losses import (
    FeatureNetwork,
    ReconstructionObjective,
    Schedule,
    next_token_labels,
    next_token_loss,
    reconstruction_terms,
    total,
)
from worldline.weights.read import open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save as save_tensors
from worldline.weights.write import save_module

SHAPE = VideoShape(33, 128, 192)
GRID = LatentShape(5, 8, 12)
TOKENIZER = CosmosTokenizerConfig(
    channels=16,
    level_channels=(32, 64, 80),
    spatial=16,
    latent_channels=6,
    levels=(4, 4, 4, 4, 4, 4),
)
AUTOREGRESSIVE = ARTransformerConfig(
    depth=7,
    width=160,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    hidden=448,
    vocabulary=4096,
    embedding_rows=4096,
    grid=GRID,
)
_PERCEPTUAL = 0.1  # weight of the perceptual term in the released recipes
_HELD_OUT = 900_000  # seeds from here to 999,999 steer training; evaluation starts at 1,000,000


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both commands are told; None takes the command's own default."""

    folder: Path
    steps: int | None
    batch: int | None
    clips: int | None
    seconds: float | None
    workers: int
    seed: int
    rate: float | None
    compiled: bool
    device: str


@click.group()
def main() -> None:
    """Train the small worlds that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--folder", type=click.Path(path_type=Path), required=True),
        click.option("--steps", type=int, default=None, help="Of the whole run."),
        click.option("--batch", type=int, default=None),
        click.option("--clips", type=int, default=None, help="How many clips to draw."),
        click.option("--seconds", type=float, default=None, help="Stop and save after this time."),
        click.option("--workers", type=int, default=0),
        click.option("--seed", type=int, default=0),
        click.option("--rate", type=float, default=None, help="Peak of the learning rate."),
        click.option("--compile/--no-compile", "compiled", default=False),
        click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu"),
    ):
        command = option(command)
    return command


@main.command()
@_options
@click.option(
    "--features",
    type=click.Path(path_type=Path, exists=True),
    help="Weights of a VGG16-shaped network: adds the perceptual term with the released weight.",
)
def tokenizer(features: Path | None, **options: Any) -> None:
    """Train the discrete video tokenizer on generated clips.

    By the colour term alone, or with --features by the perceptual term too.
    """
    run = Run(**options)
    batch, clips, device = run.batch or 48, run.clips or 24_000, run.device
    torch.manual_seed(run.seed)
    model = CosmosTokenizer(TOKENIZER)
    model.reset_parameters()
    model = model.to(device)
    pool = ClipPool(physics_batches(range(clips), SHAPE, device, workers=run.workers), clips, SHAPE)
    network = None
    if features is not None:
        stored = open_checkpoint(features)
        network = FeatureNetwork.from_tensors({name: stored.read(name) for name in stored.tensors})
        network = network.to(device)
    measure: Any = _reconstruction_loss
    if run.compiled:
        measure = torch.compile(_reconstruction_loss, dynamic=False)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        views = pool.batch(run.seed, step, batch)
        with _mixed_precision(device):
            loss, error = measure(model, views, network)
        return loss, {"psnr": -10 * error.log10()}

    config = LoopConfig(steps=run.steps or 12_000, learning_rate=run.rate or 1.5e-3)
    done, average = fit(model, loss_of, config, run.folder, seconds=run.seconds)
    average.swap(model)
    export_tokenizer(model, run.folder / "export")
    aside = range(_HELD_OUT, _HELD_OUT + min(clips, 64))
    held_out = next(physics_batches(aside, SHAPE, device))
    figures = {"steps": done, "psnr": reconstruction_psnr(model.eval(), held_out)}
    (run.folder / "result.json").write_text(json.dumps(figures))
    logging.info("%s", figures)


def _mixed_precision(device: str) -> torch.autocast:
    """bf16 where it is fast."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def _reconstruction_loss(
    model: CosmosTokenizer, clips: Tensor, features: FeatureNetwork | None
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the mean squared error in [0, 1], of uint8 clips (B, T, H, W, 3)."""
    video = as_video(clips)
    reconstruction = model.reconstruct(video)
    perceptual = None if features is None else Schedule.constant(_PERCEPTUAL)
    objective = ReconstructionObjective(perceptual=perceptual)
    # the weights of both terms are constant: any iteration has the same
    terms = reconstruction_terms(objective, video, reconstruction, 0, features=features)
    loss = total(terms)
    error = (reconstruction.detach().float().clamp(-1, 1) - video).square().mean() / 4
    return loss, error


@torch.no_grad()
def reconstruction_psnr(model: CosmosTokenizer, clips: Tensor) -> float:
    """Return the mean over clips (B, T, H, W, 3) of the PSNR after encoding and decoding."""
    figures = []
    for clip in clips:
        video = as_video(clip[None])
        decoded = model.decode_tokens(model.encode_tokens(video)).clamp(-1, 1)
        figures.append(-10 * ((decoded - video).square().mean() / 4).log10())
    return float(torch.stack(figures).mean())


def export_tokenizer(model: CosmosTokenizer, folder: Path) -> None:
    """Write encoder and decoder in bf16 under the names of the released files."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = tokenizer_weights.released_tensors(model)
    for half, tensors in halves.items():
        save_tensors(tensors, folder / f"{half}.safetensors")


@main.command()
@_options
@click.option("--tokenizer", "tokenizer_folder", type=click.Path(path_type=Path), required=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Weights to begin with: an export folder."
)
def autoregressive(tokenizer_folder: Path, start: Path | None, **options: Any) -> None:
    """Train the transformer on the tokens of generated clips, next token by next token."""
    run = Run(**options)
    batch, clips, device, folder = run.batch or 256, run.clips or 150_000, run.device, run.folder
    half = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    coder = load_tokenizer(tokenizer_folder, device=device, dtype=half)
    cached = folder / "tokens.pt"
    if cached.exists():
        tokens = torch.load(cached, weights_only=True).to(device)
    else:
        tokens = encode_pool(
            coder, physics_batches(range(clips), SHAPE, device, workers=run.workers), half
        )
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tokens.cpu(), cached)
    aside = range(_HELD_OUT, _HELD_OUT + min(clips, 256))
    held_out = encode_pool(coder, physics_batches(aside, SHAPE, device), half)
    del coder
    torch.manual_seed(run.seed)
    if start is None:
        model = ARTransformer(AUTOREGRESSIVE)
        model.reset_parameters()
        model = model.to(device)
    else:
        with torch.device("meta"):
            model = ARTransformer(AUTOREGRESSIVE)
        source = open_checkpoint(start / "model.safetensors")
        load_into(model, source, KEYS, device=device, dtype=torch.float32)
    positions = make_positions(AUTOREGRESSIVE, device, torch.float32)
    measure: Any = _next_token_loss
    if run.compiled:
        measure = torch.compile(_next_token_loss, dynamic=False)

    @torch.no_grad()
    def held_out_loss() -> Tensor:
        with _mixed_precision(device):
            parts = [_next_token_loss(model, rows, positions) for rows in held_out.split(128)]
        return torch.stack(parts).mean()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(tokens), (batch,), generator=generator(run.seed, step))
        with _mixed_precision(device):
            loss = measure(model, tokens[to_device(chosen, device)], positions)
        return loss, {"held_out": held_out_loss()} if step % 500 == 499 else {}

    config = LoopConfig(
        steps=run.steps or 20_000,
        learning_rate=run.rate or 3e-3,
        warmup=500,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        average_decay=0.9995,
    )
    done, average = fit(model, loss_of, config, folder, seconds=run.seconds)
    average.swap(model)
    figures = {"steps": done, "held_out": float(held_out_loss())}
    export_autoregressive(model, folder / "export")
    (folder / "result.json").write_text(json.dumps(figures))
    logging.info("%s", figures)


def _next_token_loss(model: ARTransformer, tokens: Tensor, positions: Positions) -> Tensor:
    """Return the mean loss of whole sequences (B, L), any integer dtype."""
    tokens = tokens.long()
    labels = next_token_labels(tokens, GRID.tokens_per_frame - 1)  # the first frame is given
    return next_token_loss(model(tokens, positions)[:, :-1], labels).total


def export_autoregressive(model: ARTransformer, folder: Path) -> None:
    """Write weights in bf16 under the released names, and config.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_module(model, folder / "model.safetensors", keymap=KEYS, dtype=torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(write_settings(model.config), indent=1) + "\n")


if __name__ == "__main__":
    main()
