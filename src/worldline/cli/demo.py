"""`worldline demo`: the bundled worlds continue a short clip; one picture compares them."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    import worldline

# 33 frames at 25 a second and their caption, written by `python -m tiny clip`
CLIP = Path(__file__).parents[1] / "bundled" / "demo" / "clip.mp4"

AUTOREGRESSIVE = "tiny-Cosmos-Predict1-4B"
PROMPTED = "tiny-Cosmos-Predict1-5B-Video2World"
DIFFUSION = "tiny-Cosmos-Predict1-7B-Video2World"
FLOW = "tiny-Cosmos-Predict2.5-2B"


class Way(NamedTuple):
    """One video of the demo.

    Attributes:
        name: stem of its file.
        world: name of the bundled world.
        num_input_frames: frames of the clip that the world sees.
        prompted: whether it sees the caption.
        decoder: whether a diffusion decoder decodes the tokens of an autoregressive world.
    """

    name: str
    world: str
    num_input_frames: int
    prompted: bool = True
    decoder: bool = True

    @property
    def sees(self) -> str:
        """What the world is conditioned on, in words."""
        count = self.num_input_frames
        parts = [f"frames 0-{count - 1}" if count > 1 else "frame 0"] * (count > 0)
        decoding = "" if self.decoder else ", decoded by the tokenizer"
        return " and ".join(parts + ["the sentence"] * self.prompted) + decoding


WAYS = (
    Way("output", AUTOREGRESSIVE, 9, prompted=False),
    Way("diffusion", DIFFUSION, 9),
    Way("predict2.5", FLOW, 5),
)
OTHER_WAYS = (
    Way("output_discrete", AUTOREGRESSIVE, 9, prompted=False, decoder=False),
    Way("prompted", PROMPTED, 9),
    Way("prompted_discrete", PROMPTED, 9, decoder=False),
    Way("diffusion_image2world", DIFFUSION, 1),
    Way("diffusion_text2world", DIFFUSION, 0),
    Way("predict2.5_image2world", FLOW, 1),
    Way("predict2.5_text2world", FLOW, 0),
)


@click.command()
@click.option("--all", "every", is_flag=True, help="Every bundled world, input and decoder.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Random seed of the worlds.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs/demo"),
    show_default=True,
    help="Folder of the results.",
)
def demo(every: bool, seed: int, output: Path) -> None:
    """Continue a short clip with the small worlds that ship with the package.

    Writes the first frames of the clip (input.mp4), a video and its report for each world
    (output.mp4, output.json, …), and contact_sheet.png, which compares them with what really
    happens.
    """
    import torch

    from worldline.evaluate.metrics import psnr
    from worldline.video.read import read_video
    from worldline.video.sheet import contact_sheet
    from worldline.video.write import write_video

    sheet = output / "contact_sheet.png"
    _silence()
    torch.set_num_threads(1)  # the networks are tiny: on busy cores threads wait for each other
    began = time.monotonic()
    clip = read_video(CLIP)
    truth, caption = clip.frames, json.loads(CLIP.with_name("captions.json").read_text())[CLIP.name]
    write_video(truth[:9], output / "input.mp4", clip.fps or 25.0)
    click.echo(f"the clip: {caption}")
    rows, labels = [truth[:9], truth], ["input: frames 0-8", f"what really happens: {caption}"]
    for way in (*WAYS, *(OTHER_WAYS if every else ())):
        video = _generate(way, truth, caption, seed)
        path = video.save(output / f"{way.name}.mp4")
        label, count = f"{way.world} from {way.sees}", way.num_input_frames
        if count > 1 and video.frames.shape == truth.shape:
            target = truth[count:]
            still = truth[count - 1 : count].repeat(len(target), axis=0)
            label += f"; {psnr(video.frames[count:], target):.1f} dB PSNR"
            label += f", frame {count - 1} repeated {psnr(still, target):.1f}"
        click.echo(f"{path} ({time.monotonic() - began:.0f} s): {label}")
        rows.append(video.frames)
        labels.append(label)
    contact_sheet(rows, sheet, labels)
    click.echo(f"open {sheet.resolve()}")


def _generate(way: Way, truth: NDArray[np.uint8], caption: str, seed: int) -> worldline.Video:
    import worldline

    options: dict[str, Any] = {} if way.decoder else {"disable_diffusion_decoder": True}
    world = worldline.load(way.world, **options)
    frames = truth[: way.num_input_frames] if way.num_input_frames else None
    prompt: dict[str, Any] = {"prompt": caption} if way.prompted else {}
    return world.generate(frames, num_input_frames=way.num_input_frames, seed=seed, **prompt)


def _silence() -> None:
    """Hide the log lines of loading; --debug keeps them."""
    logger = logging.getLogger("worldline")
    if logger.level == logging.INFO:
        logger.setLevel(logging.WARNING)
