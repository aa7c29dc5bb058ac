"""`worldline demo`: small bundled worlds continue a clip of moving things, and show a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from worldline.world import Video

AUTOREGRESSIVE = "tiny-Cosmos-Predict1-4B"
DIFFUSION = "tiny-Cosmos-Predict1-7B-Video2World"
MODELS = {"autoregressive": AUTOREGRESSIVE, "diffusion": DIFFUSION}
SCENE = 1_000_000  # of the evaluation seeds, which no bundled model was trained on
GIVEN = 9  # frames of the clip that the model sees
MAGNIFIED = 2  # the side-by-side is shown larger, since the tiny world's frames are small


@click.command()
@click.option(
    "--kind",
    type=click.Choice([*MODELS, "all"]),
    help="Which world to show.  [default: all that are bundled]",
)
@click.option("--seed", default=0, show_default=True, help="Of the model's draws.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs/demo"),
    show_default=True,
    help="Folder of the results.",
)
def demo(kind: str | None, seed: int, output: Path) -> None:
    """Show small worlds at work.

    They ship with the package. The autoregressive one continues a clip, and the result is compared
    with the true continuation: the 9 frames given (input.mp4), the continued video (output.mp4,
    output.json), both beside each other (side_by_side.mp4) and frame by frame (contact_sheet.png).
    The diffusion world makes a video of a sentence (text2world.mp4), of the sentence and a picture
    (image2world.mp4), and of the sentence and 9 frames (video2world.mp4), frame by frame in
    diffusion_sheet.png.
    """
    from worldline.cli.run import check_folder
    from worldline.pipelines.requests import AutoregressiveRequest
    from worldline.places import bundled_names

    AutoregressiveRequest(seed=seed)  # the range of seeds is the same for all
    check_folder(output, "--output")
    chosen = set(MODELS) if kind == "all" else {kind}
    if kind is None:
        bundled = bundled_names()
        chosen = {name for name, model in MODELS.items() if model in bundled}
    if "autoregressive" in chosen:
        _continue_clip(seed, output)
    if "diffusion" in chosen:
        _show_sentence(seed, output)


def _continue_clip(seed: int, output: Path) -> None:
    import worldline
    from worldline.cli.run import describe_video, describe_world, follow
    from worldline.physics import FPS, make_clips
    from worldline.pipelines.requests import AutoregressiveRequest
    from worldline.video.write import contact_sheet, write_video

    world = worldline.load(AUTOREGRESSIVE)
    click.echo(describe_world(world), err=True)
    size = world.parts.video
    clip = make_clips([SCENE], size.frames, size.height, size.width)
    truth = clip.frames[0].numpy()
    source = output / "input.mp4"
    write_video(truth[:GIVEN], source, FPS)

    click.echo(f"continuing {source}: {clip.captions[0]}", err=True)
    request = AutoregressiveRequest(num_input_frames=GIVEN, seed=seed)
    video = follow(world.stream(source, **vars(request)), str(source))
    target = video.save(output / "output.mp4")
    write_video(_beside(video.frames, truth), output / "side_by_side.mp4", video.fps)
    contact_sheet(
        [truth, video.frames],
        output / "contact_sheet.png",
        ["true", f"continued by {AUTOREGRESSIVE} from frames 0-{GIVEN - 1}"],
    )

    click.echo(describe_video(video, target))
    _compare(video, truth)
    _tell(
        output,
        {
            "output.mp4": "the continued video",
            "side_by_side.mp4": "left continued, right true",
            "contact_sheet.png": "both, frame by frame",
        },
    )


def _show_sentence(seed: int, output: Path) -> None:
    import worldline
    from worldline.cli.run import describe_video, describe_world, follow
    from worldline.physics import make_clips
    from worldline.video.write import contact_sheet

    world = worldline.load(DIFFUSION)
    click.echo(describe_world(world), err=True)
    size = world.parts.video
    clip = make_clips([SCENE], size.frames, size.height, size.width)
    truth, prompt = clip.frames[0].numpy(), clip.captions[0]

    click.echo(f"showing: {prompt}", err=True)
    made: dict[str, Video] = {}
    for name, given in (("text2world", 0), ("image2world", 1), ("video2world", GIVEN)):
        steps = world.stream(
            truth[:given] if given else None, prompt=prompt, seed=seed, num_input_frames=given
        )
        video = follow(steps, name)
        click.echo(describe_video(video, video.save(output / f"{name}.mp4")))
        made[name] = video
    _compare(made["video2world"], truth)
    contact_sheet(
        [truth, *(video.frames for video in made.values())],
        output / "diffusion_sheet.png",
        [
            f"true: {prompt}",
            f"by {DIFFUSION} from the sentence",
            "from the sentence and frame 0",
            f"from the sentence and frames 0-{GIVEN - 1}",
        ],
    )
    _tell(
        output,
        {
            "text2world.mp4": "a video of the sentence",
            "video2world.mp4": "9 frames continued by it",
            "diffusion_sheet.png": "all three, frame by frame",
        },
    )


def _compare(video: Video, truth: NDArray[np.uint8]) -> None:
    """Say how near a continued clip is to the true one, and how near doing nothing is."""
    from worldline.evaluate.metrics import psnr

    left = truth[GIVEN:]
    predicted = psnr(video.frames[GIVEN:], left)
    repeated = psnr(truth[GIVEN - 1 : GIVEN].repeat(len(left), axis=0), left)
    click.echo(
        f"frames {GIVEN + 1}-{len(truth)} against the true continuation: {predicted:.1f} dB PSNR; "
        f"repeating frame {GIVEN} gives {repeated:.1f} dB (one clip; see the README for a hundred)"
    )


def _tell(output: Path, names: dict[str, str]) -> None:
    for name, what in names.items():
        click.echo(f"{what}: {(output / name).resolve()}")


def _beside(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two clips of one size beside each other, magnified, with a white line between."""
    import numpy as np

    line = np.full((*left.shape[:2], 4, 3), 255, np.uint8)
    both = np.concatenate([left, line, right], axis=2)
    return both.repeat(MAGNIFIED, axis=1).repeat(MAGNIFIED, axis=2)
