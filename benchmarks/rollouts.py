"""Measure clips longer than the bundled autoregressive world's window, by both ways of going on.

    python -m benchmarks.rollouts --output benchmarks/results/rollouts.json

Seeds 1,000,000 and up, which training never saw; one sample a clip, never the best of several. A
longer video begins with the frames of a shorter one, so one video of each way measures all lengths.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

import worldline
from benchmarks.tiny_quality import FIRST_SEED, GIVEN, continued, is_prompted, psnr, quartiles
from tiny.clips import make_clips
from worldline.evaluate.failures import failure_rate, find_failures
from worldline.tokenizers.cosmos.clips import decode_clip, encode_clip
from worldline.video.sheet import contact_sheet
from worldline.world import World

Frames = NDArray[np.uint8]

ROLLOUTS = ("tokens", "pixels")
LENGTHS = (33, 81, 161)


def detail(frames: Frames) -> float:
    """Mean difference of neighbouring pixels, in levels: what blur lowers."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=2)).mean())


def motion(frames: Frames) -> float:
    """Mean difference of neighbouring frames, in levels: what a still picture has none of."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def compare(frames: Frames, truth: Frames, masks: NDArray[np.bool_]) -> dict[str, float]:
    """Compare a stretch of a video with what really happens."""
    return {
        "psnr_db": psnr(frames, truth),
        "psnr_of_objects_db": psnr(frames, truth, masks),
        "psnr_of_background_db": psnr(frames, truth, ~masks),
        "detail": detail(frames) / detail(truth),
        "motion": motion(frames) / motion(truth),
    }


def stretches(length: int) -> list[tuple[int, int]]:
    """Return where a video is looked at: the frames that each length adds, in halves."""
    bounds = [GIVEN, LENGTHS[0]]
    for longer in LENGTHS[1:]:
        bounds += [(bounds[-1] + longer) // 2, longer]
    return [(a, b) for a, b in pairwise(bounds) if b <= length]


def videos(
    world: World,
    clips: list[Frames],
    captions: list[str] | None,
    way: str,
    length: int,
    at_once: int,
) -> list[Frames]:
    """Continue the clips, `at_once` in step, by their captions if there are any."""
    made: list[Frames] = []
    for first in range(0, len(clips), at_once):
        group = [clip[:GIVEN] for clip in clips[first : first + at_once]]
        each: list[dict[str, Any]] = [{"seed": first + number} for number in range(len(group))]
        if captions is not None:
            each = [{**one, "prompt": captions[one["seed"]]} for one in each]
        made += continued(world, group, each, num_video_frames=length, rollout=way)
        print(f"{way}: {len(made)} of {len(clips)}", flush=True)
    return made


@torch.inference_mode()
def reconstructed(world: World, clip: Frames) -> Frames:
    tokenizer = world.parts.tokenizer.module
    ids, _ = encode_clip(tokenizer, [clip])
    return np.concatenate(list(decode_clip(tokenizer, ids)))[: len(clip)]


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-4B", show_default=True)
@click.option("--way", "chosen", multiple=True, type=click.Choice(ROLLOUTS), help="Default: both.")
@click.option("--clips", "count", default=100, show_default=True)
@click.option("--frames", "length", default=LENGTHS[-1], show_default=True)
@click.option("--batch_size", default=8, show_default=True, help="Clips in step.")
@click.option("--device", default=None)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG of the first clips.")
def main(
    model: str,
    chosen: tuple[str, ...],
    count: int,
    length: int,
    batch_size: int,
    device: str | None,
    output: Path,
    sheet: Path | None,
) -> None:
    """Measure, print, and write a JSON file."""
    # a diffusion decoder would hide what either way does to the tokens
    world = worldline.load(model, device=device, disable_diffusion_decoder=True)
    clips, masks, captions = [], [], []
    for number in range(count):
        truth = make_clips([FIRST_SEED + number], frames=length, return_masks=True)
        assert truth.masks is not None
        clips.append(truth.frames[0].numpy())
        masks.append(truth.masks[0].numpy())
        captions += truth.captions
    by = captions if is_prompted(world) else None
    still = [np.broadcast_to(clip[GIVEN - 1], clip.shape) for clip in clips]
    ways = {"repeating the last given frame": still}
    ways["tokenizer alone"] = [reconstructed(world, clip) for clip in clips]
    seconds = {}
    for way in chosen or ROLLOUTS:
        started = time.perf_counter()
        ways[f"rollout {way}"] = videos(world, clips, by, way, length, batch_size)
        seconds[way] = round((time.perf_counter() - started) / count, 2)
    result: dict[str, Any] = {
        "model": model,
        "torch": torch.__version__,
        "device": str(world.device),
        "seeds": [FIRST_SEED, FIRST_SEED + count - 1],
        "sampling": "temperature 1.0, top_p 0.8, one sample a clip",
        "seconds_a_clip": seconds,
        "detail and motion": "median over clips of the share of the true clip's",
        "ways": {},
    }
    for name, made in ways.items():
        entry: dict[str, Any] = {"stretches": {}, "failures": {}}
        for start, end in stretches(length):
            figures: dict[str, list[float]] = defaultdict(list)
            for frames, clip, mask in zip(made, clips, masks, strict=True):
                compared = compare(frames[start:end], clip[start:end], mask[start:end])
                for figure, value in compared.items():
                    figures[figure].append(value)
            entry["stretches"][f"frames {start + 1} to {end}"] = {
                figure: quartiles(values) if "psnr" in figure else round(median(values), 3)
                for figure, values in figures.items()
            }
        for longest in (n for n in LENGTHS if n <= length and name.startswith("rollout")):
            with ThreadPoolExecutor() as threads:  # seconds a clip
                begun = [threads.submit(find_failures, f[:longest], GIVEN) for f in made]
            found = [one.result() for one in begun]
            entry["failures"][f"{longest} frames"] = failure_rate(found).as_json()
        result["ways"][name] = entry
        output.write_text(json.dumps(result, indent=1) + "\n")
        brief = {
            stretch: {
                figure: value["median"] if isinstance(value, dict) else value
                for figure, value in figures_of.items()
            }
            for stretch, figures_of in entry["stretches"].items()
        }
        print(name, json.dumps(brief, indent=1), flush=True)
        print({n: f["failure_rate"]["count"] for n, f in entry["failures"].items()}, flush=True)
    if sheet is not None:
        rows = [ways[name][n] for n in range(min(4, count)) for name in ways]
        contact_sheet(
            rows, sheet, [f"{FIRST_SEED + n}, {k}" for n in range(min(4, count)) for k in ways]
        )


if __name__ == "__main__":
    main()
