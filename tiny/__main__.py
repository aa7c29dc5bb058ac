"""Train the tiny worlds that ship with the package, in segments that a kill cannot spoil.

    python -m tiny tokenizer --folder runs/tokenizer --seconds 540
    python -m tiny autoregressive --folder runs/ar --tokenizer runs/tokenizer/export

    python -m tiny tokenizer --kind continuous --folder runs/latents --seconds 540
    python -m tiny diffusion --folder runs/dit --tokenizer runs/latents/export

    python -m tiny wan --folder runs/wan --seconds 540
    python -m tiny flow --folder runs/flow --tokenizer runs/wan/export

Each call goes on where the last one stopped; under `torchrun --nproc_per_node=N -m tiny` it trains
on N GPUs. The networks, losses and file layouts are those of the released models; only the sizes
are small.
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
from tiny.clips import make_clips
from tiny.decoder import train_decoder
from tiny.diffusion import train_diffusion
from tiny.flow import train_flow
from tiny.motion import FPS
from tiny.run import running
from tiny.tokenizer import train_tokenizer
from tiny.wan import train_wan
from worldline.video.write import write_video

_EXISTING = click.Path(path_type=Path, exists=True)
_COMMON = (
    click.option(
        "--folder",
        type=click.Path(path_type=Path),
        required=True,
        help="States, log.jsonl, and in the end export/ and result.json.",
    ),
    click.option("--steps", type=int, help="Length of the whole run."),
    click.option("--batch", type=int, help="Clips of each process in a step."),
    click.option("--clips", type=int, help="Number of clips to draw."),
    click.option("--seconds", type=float, help="Stop and save after this time."),
    click.option("--workers", type=int, default=0, help="Processes that draw clips."),
    click.option("--seed", type=int, default=0, help="Random seed of weights, batches and noise."),
    click.option("--rate", type=float, help="Peak of the learning rate."),
    click.option("--weights", "start", type=_EXISTING, help="Export folder to begin with."),
    click.option("--compile/--no-compile", "compiled", default=False, help="Compile the network."),
    click.option(
        "--graph/--no-graph", "graphed", default=False, help="One CUDA graph a step; needs a GPU."
    ),
    click.option(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        show_default=True,
        help="cuda, cuda:1, cpu, …",
    ),
)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_COMMON):  # the last one added is listed first
        command = option(command)
    return command


_tokenizer_option = click.option(
    "--tokenizer", type=_EXISTING, required=True, help="Export folder of a tokenizer."
)
_negative_option = click.option(
    "--negative_prompt", multiple=True, help="A text to train like no text at all."
)


@click.group()
def main() -> None:
    """Train the tiny worlds that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


@main.command()
@_options
@click.option("--kind", type=click.Choice(["discrete", "continuous"]), default="discrete")
def tokenizer(kind: str, start: Path | None, **options: Any) -> None:
    """Train a video tokenizer to token ids or to continuous latents."""
    with running(options) as run:
        train_tokenizer(run, kind, start)


@main.command()
@_options
@_tokenizer_option
@click.option("--text", type=_EXISTING, help="Folder of a T5 encoder, for a Video2World model.")
def autoregressive(tokenizer: Path, text: Path | None, start: Path | None, **options: Any) -> None:
    """Train the transformer on the tokens of clips, next token by next token."""
    with running(options) as run:
        train_autoregressive(run, tokenizer, text, start)


@main.command()
@_options
@_tokenizer_option
@_negative_option
def diffusion(
    tokenizer: Path, start: Path | None, negative_prompt: tuple[str, ...], **options: Any
) -> None:
    """Train the diffusion transformer, and its T5 encoder with it, on captioned clips.

    A clip has none, one or two conditioning latent frames and its caption or none, so that one
    network makes a video of a text, an image or a video.
    """
    with running(options) as run:
        train_diffusion(run, tokenizer, start, negative_prompt)


@main.command()
@_options
def wan(start: Path | None, **options: Any) -> None:
    """Train a video tokenizer laid out as Wan2.1's, to continuous latents."""
    with running(options) as run:
        train_wan(run, start)


@main.command()
@_options
@_tokenizer_option
@_negative_option
def flow(
    tokenizer: Path, start: Path | None, negative_prompt: tuple[str, ...], **options: Any
) -> None:
    """Train the flow transformer, and its Reason1 encoder with it, as `diffusion` does."""
    with running(options) as run:
        train_flow(run, tokenizer, start, negative_prompt)


@main.command()
@_options
@_tokenizer_option
@click.option(
    "--latents", type=_EXISTING, required=True, help="Export folder of a continuous tokenizer."
)
@click.option("--text", type=_EXISTING, required=True, help="Folder of a T5 encoder.")
def decoder(tokenizer: Path, latents: Path, text: Path, start: Path | None, **options: Any) -> None:
    """Train the diffusion decoder, which turns tokens into finer latents than their own."""
    with running(options) as run:
        train_decoder(run, tokenizer, latents, text, start)


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
