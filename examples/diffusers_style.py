"""A world called as a pipeline of diffusers: `pipe(...).frames[0]`.

python examples/diffusers_style.py out.mp4
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import worldline
from worldline.video.read import read_video
from worldline.video.write import write_video

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"


class Pipeline:
    """Names that diffusers' users know, on a world of this machine or of a server."""

    def __init__(self, world: worldline.World | worldline.RemoteWorld) -> None:
        self.world = world

    def __call__(
        self,
        image: Image.Image | None = None,
        video: list[Image.Image] | None = None,
        prompt: str | None = None,
        num_inference_steps: int = 35,
        guidance_scale: float = 7.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        made = self.world.generate(
            video if image is None else image,
            prompt=prompt,
            num_steps=num_inference_steps,
            guidance=guidance_scale,
            seed=0 if generator is None else generator.initial_seed(),
        )
        if output_type == "pil":
            return SimpleNamespace(frames=[made.to_pil()])
        tensor = made.to_torch(float=True)  # one video: T, C, H, W from 0 to 1
        return SimpleNamespace(frames=tensor[None] if output_type == "pt" else tensor[None].numpy())


def main(output: str = "out.mp4", num_steps: str = "20") -> None:
    pipe = Pipeline(worldline.load("tiny-Cosmos-Predict1-7B-Video2World"))
    frames = pipe(
        image=Image.fromarray(read_video(CLIP).frames[0]),
        prompt="A purple triangle slides to the right across a table seen from above.",
        num_inference_steps=int(num_steps),
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    write_video(np.stack([np.asarray(frame) for frame in frames]), output, fps=25)


if __name__ == "__main__":
    main(*sys.argv[1:])
