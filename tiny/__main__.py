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
from pathlib import Path

import click
import torch

from tiny.autoregressive import autoregressive
from tiny.clips import make_clips
from tiny.decoder import decoder
from tiny.diffusion import diffusion
from tiny.flow import flow
from tiny.motion import FPS
from tiny.tokenizer import tokenizer
from tiny.wan import wan
from worldline.video.write import write_video


@click.group()
def main() -> None:
    """Train the tiny worlds that ship with the package."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape


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
    caption = json.dumps({"clip.mp4": made.captions[0]}, indent=1)
    (folder / "captions.json").write_text(caption + "\n")


for recipe in (tokenizer, autoregressive, diffusion, decoder, wan, flow):
    main.add_command(recipe)

if __name__ == "__main__":
    main()
