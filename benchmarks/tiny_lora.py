"""Train an adapter of a bundled world on clips of another look, and measure what it gains.

    python -m benchmarks.tiny_lora --output benchmarks/results/tiny_lora.json --sheet lora.png

The look is a film negative: every colour is its complement, so that a "red" object is cyan, shadows
are light and marks dark; captions, motion and texture stay. `worldline train --lora` trains on 200
clips; 50 others (seeds from 1,000,000) are continued by the world alone, with the adapter, and with
its scale at 0, which has to give the same frames as the world alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

import worldline
from benchmarks.tiny_quality import FIRST_SEED, psnr, quartiles, reconstructed
from benchmarks.tiny_runs import Frames, command, losses, report, thinned
from tiny.clips import Clips, make_clips
from tiny.motion import FPS
from worldline.video.write import write_video

# fewer latent frames than the released recipe's 16; all layers that carry text and pictures
KEYS = "objective.noise_factor=2 lora.targets=[to_q,to_k,to_v,to_out,layer1,layer2]"
SHEET_CLIPS = 8
SAME = 3  # clips that are made with the adapter at scale 0


def look(frames: NDArray[Any]) -> Frames:
    """Negative of a clip."""
    negative: Frames = 255 - frames
    return negative


def write_clips(folder: Path, clips: Clips) -> None:
    """Write clips and their captions as a data set; encoded without visible loss."""
    for name in ("videos", "metas"):
        (folder / name).mkdir(parents=True)
    for number, (frames, caption) in enumerate(zip(clips.frames, clips.captions, strict=True)):
        write_video(look(frames.numpy()), folder / "videos" / f"c{number:03}.mp4", FPS)
        (folder / "metas" / f"c{number:03}.txt").write_text(caption)


class Continuations:
    """Continuations of clips by a world and an adapter of it."""

    def __init__(self, model: str, adapter: str | None = None) -> None:
        lora = {"lora": adapter} if adapter else {}
        self.world = worldline.load(model, disable_guardrail=True, **lora)

    def __call__(self, clip: Frames, given: int, caption: str, seed: int) -> Frames:
        video = self.world.generate(clip[:given], prompt=caption, num_input_frames=given, seed=seed)
        frames: Frames = video.frames
        return frames


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-7B-Video2World", show_default=True)
@click.option("--given", default=9, show_default=True, help="Frames that are given.")
@click.option("--clips", default=200, show_default=True, help="Clips to train on.")
@click.option("--unseen", default=50, show_default=True, help="Clips to measure on.")
@click.option("--steps", default=500, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--rate", default=2e-3, show_default=True)
@click.option("--words", default=KEYS, show_default=True, help="Further KEY=VALUE of the run.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to keep clips and the run.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG of the first clips.")
def main(
    model: str,
    given: int,
    clips: int,
    unseen: int,
    steps: int,
    batch: int,
    rate: float,
    words: str,
    folder: Path | None,
    output: Path,
    sheet: Path | None,
) -> None:
    """Train, measure, print, and write a JSON file."""
    folder = folder or Path(tempfile.mkdtemp())
    if not (folder / "clips").exists():
        write_clips(folder / "clips", make_clips(range(clips)))
    began = time.perf_counter()
    given_words = [
        f"data.batch_size={batch}",
        "trainer.logging_iter=20",
        "trainer.sample_iter=0",
        f"data.cache_dir={folder / 'cache'}",
        *words.split(),
    ]
    log = command(
        *("train", model, "--lora", "--videos", str(folder / "clips"), "--name", "look"),
        *("--max_steps", str(steps), "--learning_rate", str(rate), "--", *given_words),
        folder=folder,
    )
    seconds = time.perf_counter() - began
    [adapter] = (folder / "runs").rglob(f"iter_{steps:09}_adapter")
    ways = {"base": None, "adapter": str(adapter), "scale 0": f"{adapter}:0"}
    worlds = {way: Continuations(model, path) for way, path in ways.items()}
    figures: dict[str, list[float]] = {
        "reconstruction": [],
        "repeat": [],
        "base": [],
        "adapter": [],
    }
    rows: list[tuple[Frames, str]] = []
    same = []
    for number in range(unseen):
        made = make_clips([FIRST_SEED + number])
        truth, caption = look(made.frames[0].numpy()), made.captions[0]
        videos = {way: worlds[way](truth, given, caption, number) for way in ("base", "adapter")}
        still = np.broadcast_to(truth[given - 1], truth[given:].shape)
        figures["reconstruction"].append(psnr(reconstructed(worlds["base"].world, truth), truth))
        figures["repeat"].append(psnr(still.copy(), truth[given:]))
        for way, video in videos.items():
            figures[way].append(psnr(video[given:], truth[given:]))
        if number < SAME:
            again = worlds["scale 0"](truth, given, caption, number)
            same.append(bool((again == videos["base"]).all()))
        if number < SHEET_CLIPS:
            rows.append((truth, f"truth {FIRST_SEED + number}: {caption}"))
            rows += [(v, f"{way}: {figures[way][-1]:.2f} dB") for way, v in videos.items()]
        print(FIRST_SEED + number, {n: round(v[-1], 2) for n, v in figures.items()}, flush=True)
    gains = [a - b for a, b in zip(figures["adapter"], figures["base"], strict=True)]
    result: dict[str, Any] = {
        "model": model,
        "look": "film negative",
        "torch": torch.__version__,
        "device": str(worlds["base"].world.device),
        "clips": clips,
        "unseen_seeds": [FIRST_SEED, FIRST_SEED + unseen - 1],
        "frames_given": given,
        "steps": steps,
        "batch": batch,
        "learning_rate": rate,
        "keys": words.split(),
        "train_seconds": round(seconds, 1),
        "losses": thinned(losses(log)),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.iterdir()),
        "psnr_db": {name: quartiles(values) for name, values in figures.items()},
        "gain_db": quartiles(gains),
        "clips_that_gain": sum(gain > 0 for gain in gains),
        "scale_0_has_the_frames_of_the_base": same,
    }
    report(result, rows, output, sheet)


if __name__ == "__main__":
    main()
