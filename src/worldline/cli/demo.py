"""`worldline demo`: the bundled worlds continue a short clip; one picture compares them."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import click

from worldline.cli.messages import results
from worldline.cli.run import existing

# 33 frames at 25 a second and their caption, written by `python -m tiny clip`
CLIP = Path(__file__).parents[1] / "bundled" / "demo" / "clip.mp4"

AUTOREGRESSIVE = "tiny-Cosmos-Predict1-4B"
PROMPTED = "tiny-Cosmos-Predict1-5B-Video2World"
DIFFUSION = "tiny-Cosmos-Predict1-7B-Video2World"
FLOW = "tiny-Cosmos-Predict2.5-2B"


class Way(NamedTuple):
    """One video of the demo."""

    name: str
    world: str
    num_input_frames: int
    prompted: bool = True  # whether the world sees the caption
    decoder: bool = True  # whether a diffusion decoder decodes tokens


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
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Random seed.  [default: 0]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="outputs/demo",
    help="Folder of the results.  [default: outputs/demo]",
)
@click.option("--no_overwrite", is_flag=True, help="Refuse to replace an earlier demo.")
def demo(every: bool, seed: int, output: Path, no_overwrite: bool) -> None:
    """Continue a short clip with the small worlds that ship with the package.

    Writes the first frames of the clip (input.mp4), a video and its report for each world
    (output.mp4, output.json, …), and contact_sheet.png, which compares them with what really
    happens.
    """
    import worldline
    from worldline.evaluate.metrics import psnr
    from worldline.video.read import read_video
    from worldline.video.sheet import contact_sheet
    from worldline.video.write import write_video

    for handler in logging.getLogger("worldline").handlers:
        if handler.level == logging.INFO:  # not with --debug
            handler.setLevel(logging.WARNING)
    ways, sheet = (*WAYS, *(OTHER_WAYS if every else ())), output / "contact_sheet.png"
    files = [output / "input.mp4", sheet, *(output / f"{way.name}.mp4" for way in ways)]
    present = existing(files, no_overwrite)
    clip = read_video(CLIP)
    truth, caption = clip.frames, json.loads(CLIP.with_name("captions.json").read_text())[CLIP.name]
    write_video(truth[:9], output / "input.mp4", clip.fps)
    results.add(f"the clip: {caption}")
    rows, labels = [truth[:9], truth], ["input: frames 0-8", f"what really happens: {caption}"]
    for way in ways:
        count = way.num_input_frames
        options: dict[str, Any] = {} if way.decoder else {"disable_diffusion_decoder": True}
        prompt = {"prompt": caption} if way.prompted else {}
        frames = truth[:count] if count else None
        world = worldline.load(way.world, **options)
        video = world.generate(frames, num_input_frames=count, seed=seed, **prompt)
        path = video.save(output / f"{way.name}.mp4")
        label = f"{way.name}: {way.world}, {count} input frames"
        if count > 1 and video.frames.shape == truth.shape:
            target = truth[count:]
            still = truth[count - 1 : count].repeat(len(target), axis=0)
            label += f"; {psnr(video.frames[count:], target):.1f} dB PSNR"
            label += f", frame {count - 1} repeated {psnr(still, target):.1f}"
        results.add(f"{path}: {label}")
        rows.append(video.frames)
        labels.append(label)
    contact_sheet(rows, sheet, labels)
    if present:
        results.add(f"replaced files of that name: {', '.join(path.name for path in present)}")
    results.add(f"open {sheet.resolve()}")
