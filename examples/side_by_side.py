"""Lets a world of each family continue one clip, side by side: the moving picture of the README.

python examples/side_by_side.py side_by_side.gif
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import worldline
from worldline.video.read import read_video
from worldline.video.write import write_video

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"
PROMPT = "A purple triangle slides to the right across a table seen from above, with a yellow ball."
HEADER = 18  # pixels


def main(output: str = "side_by_side.gif", num_steps: str = "20") -> None:
    truth = read_video(CLIP).frames
    denoising = {"prompt": PROMPT, "num_steps": int(num_steps), "seed": 0}
    panels = [with_label(truth, "what really happens", len(truth))]
    for name, label, given, options in (
        ("tiny-Cosmos-Predict1-4B", "autoregressive", 9, {"seed": 0}),
        ("tiny-Cosmos-Predict1-7B-Video2World", "diffusion", 9, denoising),
        ("tiny-Cosmos-Predict2.5-2B", "Predict2.5", 5, denoising),
    ):
        video = worldline.load(name).generate(truth[:given], num_input_frames=given, **options)
        panels.append(with_label(video.frames, label, given))
    frames = np.concatenate(panels, axis=2)
    held = frames[-1:].repeat(12, axis=0)  # the end stays for a second
    write_video(np.concatenate([frames, held]), output, fps=12.5)  # half of the clip's speed


def with_label(frames: NDArray[np.uint8], label: str, given: int) -> NDArray[np.uint8]:
    """Frames below a header, which changes after those that were given."""
    pictures = []
    for number, frame in enumerate(frames):
        picture = Image.new("RGB", (frame.shape[1] + 4, frame.shape[0] + HEADER), "white")
        picture.paste(Image.fromarray(frame), (2, HEADER))
        text, colour = (label, "black") if given == len(frames) else (f"{label}: made", "crimson")
        if number < given < len(frames):
            text, colour = f"{label}: given", "gray"
        ImageDraw.Draw(picture).text((4, 3), text, fill=colour)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


if __name__ == "__main__":
    main(*sys.argv[1:])
