"""Continue nine frames of a clip with the world that ships with the package.

python examples/continue_clip.py out.mp4
"""

import sys
from pathlib import Path

import worldline
from worldline.video.read import read_video

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"


def main(output: str = "out.mp4") -> None:
    frames = read_video(CLIP).frames[:9]  # uint8 (T, H, W, 3); a file's path works too
    world = worldline.load("tiny-Cosmos-Predict1-4B")
    video = world.generate(frames, num_input_frames=9, seed=0, top_p=0.8)
    print(video.save(output), f"{video.report['tokens_per_second']} tokens a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
