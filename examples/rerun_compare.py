"""Prediction beside truth in Rerun's viewer, frame by frame (`pip install rerun-sdk`).

python examples/rerun_compare.py compare.rrd && rerun compare.rrd
"""

import sys
from pathlib import Path

import numpy as np

import worldline
from worldline.video.read import read_video

CLIP = Path(worldline.__file__).parent / "bundled" / "demo" / "clip.mp4"


def main(output: str = "compare.rrd", url: str = "") -> None:
    try:
        import rerun as rr
        import rerun.blueprint as rrb
    except ImportError as error:
        raise SystemExit(f"{error}; run: pip install rerun-sdk") from None
    truth = read_video(CLIP).frames
    world = worldline.connect(url) if url else worldline.load("tiny-Cosmos-Predict1-4B")
    prediction = world.generate(truth[:9], num_input_frames=9, seed=0).frames
    views = [rrb.Spatial2DView(origin=name) for name in ("truth", "prediction")]
    rr.init("worldline")
    rr.save(output, default_blueprint=rrb.Horizontal(*views, rrb.TimeSeriesView(origin="error")))
    for number, (true, made) in enumerate(zip(truth, prediction, strict=False)):
        rr.set_time("frame", sequence=number)
        rr.log("truth", rr.Image(true))
        rr.log("prediction", rr.Image(made))
        rr.log("error", rr.Scalars(np.abs(true.astype(float) - made).mean()))


if __name__ == "__main__":
    main(*sys.argv[1:])
