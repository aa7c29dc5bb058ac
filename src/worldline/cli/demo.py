"""`worldline demo`: small bundled worlds continue a clip of moving things, and show a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from worldline.world import Video

AUTOREGRESSIVE = "tiny-Cosmos-Predict1-4B"
PROMPTED = "tiny-Cosmos-Predict1-5B-Video2World"
DIFFUSION = "tiny-Cosmos-Predict1-7B-Video2World"
FLOW = "tiny-Cosmos-Predict2.5-2B"
MODELS = {
    "autoregressive": AUTOREGRESSIVE,
    "autoregressive-video2world": PROMPTED,
    "diffusion": DIFFUSION,
    "predict2.5": FLOW,
}
SCENE = 1_000_000  # of the evaluation seeds, which no bundled model was trained on
GIVEN = 9  # frames of the clip that an autoregressive model sees
MAGNIFIED = 2  # the side-by-side is shown larger, since the tiny world's frames are small


class _Way(NamedTuple):
    """A way from tokens to frames; without a diffusion decoder there is but one."""

    words: str
    suffix: str
    without: bool | None


_ONE_WAY = (_Way("", "", None),)
_BOTH_WAYS = (
    _Way(", decoded by the tokenizer", "_discrete", True),
    _Way(", decoded by diffusion", "", False),
)


@click.command()
@click.option(
    "--kind",
    type=click.Choice([*MODELS, "all"]),
    default="all",
    show_default=True,
    help="Which world to show; all are those that are bundled.",
)
@click.option("--seed", default=0, show_default=True, help="Of the model's draws.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs/demo"),
    show_default=True,
    help="Folder of the results.",
)
def demo(kind: str, seed: int, output: Path) -> None:
    """Show small worlds at work.

    They ship with the package. The autoregressive one continues a clip, and the result is compared
    with the true continuation: the 9 frames given (input.mp4), the continued video (output.mp4,
    output.json), both beside each other (side_by_side.mp4) and frame by frame (contact_sheet.png).
    Where a diffusion decoder ships too, output.mp4 is decoded by it, and output_discrete.mp4 is the
    same tokens decoded without; all are shown. The autoregressive Video2World model does the same
    by a sentence (prompted_output.mp4, …). The diffusion world makes a video of a sentence
    (text2world.mp4), of the sentence and a picture (image2world.mp4), and of the sentence and 9
    frames (video2world.mp4), frame by frame in diffusion_sheet.png. So does that of Predict2.5, of
    5 frames (predict2.5_text2world.mp4, …).
    """
    from worldline.cli.run import check_folder
    from worldline.locate import bundled_names
    from worldline.pipelines.requests import AutoregressiveRequest

    AutoregressiveRequest(seed=seed)  # the range of seeds is the same for all
    check_folder(output, "--output")
    chosen = {kind}
    if kind == "all":
        bundled = bundled_names()
        chosen = {name for name, model in MODELS.items() if model in bundled}
    if "autoregressive" in chosen:
        _continue_clip(AUTOREGRESSIVE, seed, output)
    if "autoregressive-video2world" in chosen:
        _continue_clip(PROMPTED, seed, output, prefix="prompted_")
    if "diffusion" in chosen:
        _show_sentence(DIFFUSION, seed, output, sheet="diffusion_sheet.png")
    if "predict2.5" in chosen:
        _show_sentence(FLOW, seed, output, prefix="predict2.5_")


def _continue_clip(model: str, seed: int, output: Path, *, prefix: str = "") -> None:
    """Continue the clip, with a sentence if the names of the files have a `prefix`."""
    import worldline
    from worldline.cli.run import describe_video, describe_world, follow
    from worldline.locate import has_decoder
    from worldline.physics import FPS, make_clips
    from worldline.pipelines.requests import AutoregressiveRequest
    from worldline.video.write import contact_sheet, write_video

    ways = _BOTH_WAYS if has_decoder(model) else _ONE_WAY
    worlds = [worldline.load(model, disable_diffusion_decoder=way.without) for way in ways]
    click.echo(describe_world(worlds[0]), err=True)
    size = worlds[0].parts.video
    clip = make_clips([SCENE], size.frames, size.height, size.width)
    truth, sentence = clip.frames[0].numpy(), clip.captions[0]
    source = output / "input.mp4"
    write_video(truth[:GIVEN], source, FPS)

    click.echo(f"continuing {source}: {sentence}", err=True)
    prompt = sentence if prefix else None
    request = AutoregressiveRequest(num_input_frames=GIVEN, seed=seed, prompt=prompt)
    made: dict[str, Video] = {}
    for way, world in zip(ways, worlds, strict=True):
        video = follow(world.stream(source, **vars(request)), f"{source}{way.words}")
        target = video.save(output / f"{prefix}output{way.suffix}.mp4")
        click.echo(describe_video(video, target))
        made[way.words] = video
    clips = [video.frames for video in made.values()]
    write_video(_beside(*clips, truth), output / f"{prefix}side_by_side.mp4", FPS)
    given = f"frames 0-{GIVEN - 1}{' and the sentence' if prompt else ''}"
    contact_sheet(
        [truth, *clips],
        output / f"{prefix}contact_sheet.png",
        [
            f"true: {sentence}" if prompt else "true",
            f"continued by {model} from {given}{ways[0].words}",
            *(f"the same tokens{way.words}" for way in ways[1:]),
        ],
    )

    _compare(made, truth)
    left = "the same tokens decoded by the tokenizer and by diffusion" if ways[1:] else "continued"
    _tell(
        output,
        {
            f"{prefix}output.mp4": "the continued video",
            f"{prefix}side_by_side.mp4": f"left {left}, right true",
            f"{prefix}contact_sheet.png": "all of them, frame by frame",
        },
    )


def _show_sentence(
    model: str, seed: int, output: Path, *, prefix: str = "", sheet: str = "sheet.png"
) -> None:
    """Make a video of a sentence, alone and with one or more frames of the clip."""
    import worldline
    from worldline.cli.run import describe_video, describe_world, follow
    from worldline.physics import make_clips
    from worldline.video.write import contact_sheet
    from worldline.world.denoising import DenoisingWorld

    world = worldline.load(model)
    assert isinstance(world, DenoisingWorld)
    click.echo(describe_world(world), err=True)
    size, several = world.parts.video, world.frames_given[1]
    clip = make_clips([SCENE], size.frames, size.height, size.width)
    truth, prompt = clip.frames[0].numpy(), clip.captions[0]

    click.echo(f"showing: {prompt}", err=True)
    made: dict[str, Video] = {}
    for name, given in (("text2world", 0), ("image2world", 1), ("video2world", several)):
        steps = world.stream(
            truth[:given] if given else None, prompt=prompt, seed=seed, num_input_frames=given
        )
        video = follow(steps, f"{prefix}{name}")
        click.echo(describe_video(video, video.save(output / f"{prefix}{name}.mp4")))
        made[name] = video
    _compare({"": made["video2world"]}, truth, several)
    contact_sheet(
        [truth, *(video.frames for video in made.values())],
        output / f"{prefix}{sheet}",
        [
            f"true: {prompt}",
            f"by {model} from the sentence",
            "from the sentence and frame 0",
            f"from the sentence and frames 0-{several - 1}",
        ],
    )
    _tell(
        output,
        {
            f"{prefix}text2world.mp4": "a video of the sentence",
            f"{prefix}video2world.mp4": f"{several} frames continued by it",
            f"{prefix}{sheet}": "all three, frame by frame",
        },
    )


def _compare(made: Mapping[str, Video], truth: NDArray[np.uint8], given: int = GIVEN) -> None:
    """Say how near continued clips are to the true one, and how near doing nothing is."""
    from worldline.evaluate.metrics import psnr

    left = truth[given:]
    predicted = ", ".join(
        f"{psnr(video.frames[given:], left):.1f} dB PSNR{way.removeprefix(',')}"
        for way, video in made.items()
    )
    repeated = psnr(truth[given - 1 : given].repeat(len(left), axis=0), left)
    click.echo(
        f"frames {given + 1}-{len(truth)} against the true continuation: {predicted}; "
        f"repeating frame {given} gives {repeated:.1f} dB (one clip; see the README for a hundred)"
    )


def _tell(output: Path, names: dict[str, str]) -> None:
    for name, what in names.items():
        click.echo(f"{what}: {(output / name).resolve()}")


def _beside(*clips: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return clips of one size beside each other, magnified, with white lines between."""
    import numpy as np

    line = np.full((*clips[0].shape[:2], 4, 3), 255, np.uint8)
    parts = [part for clip in clips for part in (clip, line)][:-1]
    beside = np.concatenate(parts, axis=2)
    return beside.repeat(MAGNIFIED, axis=1).repeat(MAGNIFIED, axis=2)
