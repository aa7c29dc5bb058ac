"""Draw several futures of one clip: the same nine frames, another seed each time.

python examples/several_futures.py futures.png 3
"""

import sys
from pathlib import Path

import worldline
from worldline.video.read import read_video
from worldline.video.sheet import contact_sheet

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"


def main(output: str = "futures.png", count: str = "3") -> None:
    truth = read_video(CLIP).frames
    world = worldline.load("tiny-Cosmos-Predict1-4B")
    rows, labels = [truth], ["what really happens"]
    for seed in range(int(count)):
        for step in world.stream(truth[:9], seed=seed):
            if step.kind == "tokens" and step.done % 96 == 0:
                print(f"future {seed}: {step.done} of {step.total} tokens")
            if step.video is not None:
                rows.append(step.video.frames)
                labels.append(f"future {seed}")
    contact_sheet(rows, output, labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
