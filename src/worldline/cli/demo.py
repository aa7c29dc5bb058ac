"""`worldline demo`: a small bundled world continues a clip of moving things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODEL = "tiny-Cosmos-Predict1-4B"
SCENE = 1_000_000  # of the evaluation seeds, which no bundled model was trained on
GIVEN = 9  # frames of the clip that the model sees
MAGNIFIED = 2  # the side-by-side is shown larger, since the tiny world's frames are small


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the model's draws.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs/demo"),
    show_default=True,
    help="Folder of the results.",
)
def demo(seed: int, output: Path) -> None:
    """Show a small world continuing a clip.

    Both ship with the package; the result is compared with the true continuation. Writes the 9
    frames given (input.mp4), the continued video (output.mp4, output.json), both beside each other
    (side_by_side.mp4) and frame by frame (contact_sheet.png).
    """
    from worldline.cli.autoregressive import check_folder, describe_video, describe_world, follow
    from worldline.pipelines.autoregressive import AutoregressiveRequest

    request = AutoregressiveRequest(num_input_frames=GIVEN, seed=seed)
    check_folder(output, "--output")

    import numpy as np

    import worldline
    from worldline.evaluate.metrics import psnr
    from worldline.physics import FPS, make_clips
    from worldline.video.write import contact_sheet, write_video

    world = worldline.load(MODEL)
    click.echo(describe_world(world), err=True)
    size = world.parts.video
    clip = make_clips([SCENE], size.frames, size.height, size.width)
    truth = clip.frames[0].numpy()
    source = output / "input.mp4"
    write_video(truth[:GIVEN], source, FPS)

    click.echo(f"continuing {source}: {clip.captions[0]}", err=True)
    video = follow(world.stream(source, **vars(request)), str(source))
    target = video.save(output / "output.mp4")
    repeated = np.repeat(truth[GIVEN - 1 : GIVEN], size.frames, axis=0)
    write_video(_beside(video.frames, truth), output / "side_by_side.mp4", video.fps)
    contact_sheet(
        [truth, video.frames],
        output / "contact_sheet.png",
        ["true", f"continued by {MODEL} from frames 0-{GIVEN - 1}"],
    )

    click.echo(describe_video(video, target))
    predicted, baseline = (
        psnr(frames[GIVEN:], truth[GIVEN:]) for frames in (video.frames, repeated)
    )
    click.echo(
        f"frames {GIVEN + 1}-{size.frames} against the true continuation: {predicted:.1f} dB PSNR; "
        f"repeating frame {GIVEN} gives {baseline:.1f} dB (one clip; see the README for a hundred)"
    )
    for name, what in (
        ("output.mp4", "the continued video"),
        ("side_by_side.mp4", "left continued, right true"),
        ("contact_sheet.png", "both, frame by frame"),
    ):
        click.echo(f"{what}: {(output / name).resolve()}")


def _beside(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two clips of one size beside each other, magnified, with a white line between."""
    import numpy as np

    line = np.full((*left.shape[:2], 4, 3), 255, np.uint8)
    both = np.concatenate([left, line, right], axis=2)
    return both.repeat(MAGNIFIED, axis=1).repeat(MAGNIFIED, axis=2)
