"""Train the small worlds that ship with the package, in segments that a kill cannot spoil.

    python -m tiny tokenizer --folder runs/tokenizer --seconds 540
    python -m tiny autoregressive --folder runs/ar --tokenizer runs/tokenizer/export

    python -m tiny tokenizer --kind continuous --folder runs/latents --seconds 540
    python -m tiny diffusion --folder runs/dit --tokenizer runs/latents/export

    python -m tiny wan --folder runs/wan --seconds 540
    python -m tiny flow --folder runs/flow --tokenizer runs/wan/export

Each call goes on where the last one stopped; under `torchrun --nproc_per_node=N` it trains on N
GPUs. The networks, losses and file layouts are those of the released models; only the sizes are
small.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from tiny.autoregressive import train_autoregressive
from tiny.clips import FPS, make_clips
from tiny.decoder import train_decoder
from tiny.diffusion import train_diffusion
from tiny.flow import train_flow
from tiny.run import running
from tiny.tokenizer import train_tokenizer
from tiny.wan import train_wan
from worldline.video.write import write_video


@click.group()
def main() -> None:
    """Train the small worlds that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


def _options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--folder",
            type=click.Path(path_type=Path),
            required=True,
            help="States, log.jsonl, and in the end export/ and result.json.",
        ),
        click.option("--steps", type=int, default=None, help="Of the whole run."),
        click.option("--batch", type=int, default=None, help="Of each process."),
        click.option("--clips", type=int, default=None, help="How many clips to draw."),
        click.option("--seconds", type=float, default=None, help="Stop and save after this time."),
        click.option("--workers", type=int, default=0, help="Processes that draw clips."),
        click.option("--seed", type=int, default=0, help="Of weights, batches and noise."),
        click.option("--rate", type=float, default=None, help="Peak of the learning rate."),
        click.option(
            "--weights",
            "start",
            type=click.Path(path_type=Path, exists=True),
            help="Weights to begin with: an export folder.",
        ),
        click.option(
            "--compile/--no-compile", "compiled", default=False, help="Compile the network."
        ),
        click.option(
            "--graph/--no-graph",
            "graphed",
            default=False,
            help="Run a step as one CUDA graph; needs a GPU.",
        ),
        click.option(
            "--device",
            default="cuda" if torch.cuda.is_available() else "cpu",
            show_default=True,
            help="cuda, cuda:1, cpu, …",
        ),
    )
    for option in reversed(options):  # the last one added is shown first
        command = option(command)
    return command


_tokenizer_option = click.option(
    "--tokenizer",
    "tokenizer_folder",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="An export folder.",
)
_undescribed_option = click.option(
    "--undescribed",
    multiple=True,
    help="A text that shall say nothing of a clip, as no text at all; a negative prompt.",
)


@main.command()
@_options
@click.option("--kind", type=click.Choice(["discrete", "continuous"]), default="discrete")
@click.option(
    "--features",
    type=click.Path(path_type=Path, exists=True),
    help="Weights of a VGG16-shaped network: adds the perceptual term with the released weight.",
)
def tokenizer(kind: str, features: Path | None, start: Path | None, **options: Any) -> None:
    """Train a video tokenizer on generated clips, to token ids or to continuous latents.

    By the colour term alone, or with --features by the perceptual term too.
    """
    with running(options) as run:
        train_tokenizer(run, kind, features, start)


@main.command()
@_options
@_tokenizer_option
@click.option(
    "--text",
    "text_folder",
    type=click.Path(path_type=Path, exists=True),
    help="Folder of a T5 encoder: a model of clips and their captions (Video2World).",
)
def autoregressive(
    tokenizer_folder: Path, text_folder: Path | None, start: Path | None, **options: Any
) -> None:
    """Train the transformer on the tokens of generated clips, next token by next token."""
    with running(options) as run:
        train_autoregressive(run, tokenizer_folder, text_folder, start)


@main.command()
@_options
@_tokenizer_option
@_undescribed_option
def diffusion(
    tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...], **options: Any
) -> None:
    """Train the diffusion transformer, and the text encoder with it, on captioned clips.

    A clip is given with none, one or two latent frames known and with its caption or none, so
    that one network makes a world of a text, an image or a video.
    """
    with running(options) as run:
        train_diffusion(run, tokenizer_folder, start, undescribed)


@main.command()
@_options
def wan(start: Path | None, **options: Any) -> None:
    """Train a video tokenizer laid out as Wan2.1's on generated clips, to continuous latents."""
    with running(options) as run:
        train_wan(run, start)


@main.command()
@_options
@_tokenizer_option
@_undescribed_option
def flow(
    tokenizer_folder: Path, start: Path | None, undescribed: tuple[str, ...], **options: Any
) -> None:
    """Train the flow transformer, and the text encoder with it, on captioned clips.

    A clip is given with none, one or two latent frames known and with its caption or none, so
    that one network makes a world of a text, an image or a video.
    """
    with running(options) as run:
        train_flow(run, tokenizer_folder, start, undescribed)


@main.command()
@_options
@_tokenizer_option
@click.option(
    "--latents",
    "latents_folder",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="An export folder of a continuous tokenizer.",
)
@click.option(
    "--text",
    "text_folder",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder of a T5 encoder.",
)
def decoder(
    tokenizer_folder: Path,
    latents_folder: Path,
    text_folder: Path,
    start: Path | None,
    **options: Any,
) -> None:
    """Train the diffusion decoder, which turns tokens into finer latents than their own."""
    with running(options) as run:
        train_decoder(run, tokenizer_folder, latents_folder, text_folder, start)


@main.command()
@click.option("--seed", default=1_000_000, show_default=True, help="Evaluation seeds start here.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("src/worldline/bundled/demo"),
    show_default=True,
)
def clip(seed: int, folder: Path) -> None:
    """Write the clip of `worldline demo` and its caption."""
    made = make_clips([seed])
    write_video(made.frames[0].numpy(), folder / "clip.mp4", FPS)
    captions = {"clip.mp4": made.captions[0]}
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")


if __name__ == "__main__":
    main()
