"""Measure a small autoregressive world on clips that it never saw, by both ways of decoding.

    python -m benchmarks.tiny_quality --output benchmarks/results/tiny_quality.json

Seeds 1,000,000 and up; training stays below. One sample a clip, with the released sampling, never
the best of several; the same tokens are decoded by the tokenizer and, where there is one, by the
diffusion decoder. A Video2World model is given each clip's caption.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

import worldline
from tiny.clips import make_clips
from worldline.evaluate import metrics
from worldline.evaluate.failures import Failure, failure_rate, find_failures
from worldline.evaluate.metrics import ssim
from worldline.families.autoregressive.family import Decoding
from worldline.families.autoregressive.request import ARRequest
from worldline.parallel.halo import SharedRows
from worldline.parallel.mesh import Axis
from worldline.report import Recorder
from worldline.sampling.solvers import finish
from worldline.shapes import VideoShape
from worldline.video.convert import signed_to_uint8
from worldline.video.sheet import contact_sheet
from worldline.world import Job, World

Frames = NDArray[np.uint8]

FIRST_SEED = 1_000_000
GIVEN = 9
WAYS = {"discrete": True, "diffusion": None}  # disable_diffusion_decoder; None: where there is none
SHEET_CLIPS = 20


def quartiles(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    low, high = np.percentile(values, [25, 75])
    return {
        "median": round(median(values), digits),
        "mean": round(mean(values), digits),
        "quartiles": [round(float(low), digits), round(float(high), digits)],
        "lowest": round(min(values), digits),
    }


def differences(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    return quartiles([value - other for value, other in zip(values, others, strict=True)])


def psnr(frames: Frames, truth: Frames, mask: NDArray[np.bool_] | None = None) -> float:
    """PSNR in dB, of the pixels (T, H, W) of a mask alone if there is one."""
    if mask is None:
        return metrics.psnr(frames, truth)
    error = (frames[mask].astype(np.int64) - truth[mask]) ** 2
    return metrics.decibels(float(error.mean()))


@torch.inference_mode()
def reconstructed(world: World, frames: Frames, prompt: str | None = None) -> Frames:
    """Encode all frames of a clip, and decode them as the world decodes its own latents."""
    parts = world.parts
    tokenizer = parts.tokenizer.module
    weight = next(tokenizer.parameters())
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(weight.device).float()
    video = (video / 255 * 2 - 1).to(weight.dtype)
    if parts.decoder is None:
        return signed_to_uint8(tokenizer.reconstruct(video)[0])
    decoder, ids = parts.opened["decoder"], tokenizer.encode_tokens(video)
    context = None if prompt is None else parts.text.embed([prompt])[prompt]
    video = Decoding(VideoShape(*frames.shape[:3]), 1, SharedRows(Axis()))
    job = Job(None, None, ARRequest(), Recorder(world.device), {})
    finish(decoder.decode(parts, video, ids, job, context))
    return video.frames


def is_prompted(world: World) -> bool:
    """Whether an autoregressive world reads text."""
    return world.parts.config.context_width is not None


def continued(
    world: World, clips: Sequence[Frames], each: Sequence[dict[str, Any]], **options: Any
) -> list[Frames]:
    """Videos that continue the clips; the world sees their frames alone."""
    videos: dict[int, Frames] = {}
    options["num_input_frames"] = len(clips[0])
    for number, step in world.stream_batch(clips, each, **options):
        if step.video is not None:
            videos[number] = step.video.frames
    return [videos[number] for number in range(len(clips))]


class Measured(NamedTuple):
    """What is measured of one clip, by name."""

    psnr: dict[str, float]
    ssim: dict[str, float]
    failures: dict[str, list[Failure]]


def measure(
    truth: Frames, masks: NDArray[np.bool_], again: Frames, video: Frames, image: Frames
) -> Measured:
    """Measure a clip's reconstruction, and its continuations from 9 frames and from 1."""
    target, masks = truth[GIVEN:], masks[GIVEN:]
    still = np.broadcast_to(truth[GIVEN - 1], target.shape).copy()
    pairs = {
        "reconstruction": (again, truth),
        "repeat": (still, target),
        "predicted": (video[GIVEN:], target),
    }
    return Measured(
        {name: psnr(*pair) for name, pair in pairs.items()}
        | {f"{name}_objects": psnr(*pairs[name], masks) for name in ("repeat", "predicted")},
        {name: ssim(*pair) for name, pair in pairs.items()},
        {"9 frames": find_failures(video, GIVEN), "1 frame": find_failures(image, 1)},
    )


class Figures:
    """What is measured of one way of decoding, clip by clip."""

    def __init__(self) -> None:
        self.psnr: dict[str, list[float]] = defaultdict(list)
        self.ssim: dict[str, list[float]] = defaultdict(list)
        self.failures: dict[str, list[list[Failure]]] = defaultdict(list)

    def add(self, measured: Measured) -> None:
        for mine, values in zip((self.psnr, self.ssim, self.failures), measured, strict=True):
            for name, value in values.items():
                mine[name].append(value)

    def as_json(self) -> dict[str, Any]:
        return {
            "psnr_db": {name: quartiles(values) for name, values in self.psnr.items()},
            "ssim": {name: quartiles(values, 4) for name, values in self.ssim.items()},
            "gain_over_repeating_db": differences(self.psnr["predicted"], self.psnr["repeat"]),
            "clips_where_repeating_scores_15_to_22": sum(
                15 <= value <= 22 for value in self.psnr["repeat"]
            ),
            "failures": {
                name: failure_rate(found).as_json() for name, found in self.failures.items()
            },
        }


def table(figures: dict[str, Figures]) -> str:
    """The rows of the README's table."""
    lines = [f"| median (quartiles) | {' | '.join(figures)} |", f"|---|{'---|' * len(figures)}"]

    def row(name: str, cells: Sequence[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def cell(values: dict[str, Any]) -> str:
        low, high = values["quartiles"]
        return f"{values['median']} ({low} to {high})"

    summary = [one.as_json() for one in figures.values()]
    for kind in ("psnr_db", "ssim"):
        for name in summary[0][kind]:
            row(f"{kind} {name}", [cell(one[kind][name]) for one in summary])
    row("gain over repeating, dB", [cell(one["gain_over_repeating_db"]) for one in summary])
    for name in summary[0]["failures"]:
        row(
            f"failures from {name}",
            [str(failure_rate(one.failures[name]).failed) for one in figures.values()],
        )
    return "\n".join(lines)


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-4B", show_default=True)
@click.option("--checkpoint_dir", default="checkpoints", help="For worlds that are not bundled.")
@click.option(
    "--decoding",
    "ways",
    multiple=True,
    type=click.Choice(list(WAYS)),
    help="Default: discrete, and diffusion where the world has a decoder.",
)
@click.option("--clips", "count", default=100, show_default=True)
@click.option("--batch_size", default=5, show_default=True, help="Clips in step.")
@click.option("--device", default=None)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG of the first clips.")
def main(
    model: str,
    checkpoint_dir: str,
    ways: tuple[str, ...],
    count: int,
    batch_size: int,
    device: str | None,
    output: Path,
    sheet: Path | None,
) -> None:
    """Measure, print, and write a JSON file."""
    worlds: dict[str, World] = {}
    for way in ways or WAYS:
        world = worldline.load(
            model,
            checkpoint_dir=checkpoint_dir,
            device=device,
            disable_guardrail=True,
            disable_diffusion_decoder=WAYS[way],
        )
        if WAYS[way] or world.parts.decoder is not None:
            worlds[way] = world
    figures = {way: Figures() for way in worlds}
    rows, labels = [], []
    prompted = all(map(is_prompted, worlds.values()))
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        batch = make_clips([FIRST_SEED + number for number in numbers], return_masks=True)
        assert batch.masks is not None
        clips, masks = batch.frames.numpy(), batch.masks.numpy()
        prompts = batch.captions if prompted else [None] * len(numbers)
        each: list[dict[str, Any]] = [{"seed": number} for number in numbers]
        if prompted:
            each = [{**one, "prompt": prompt} for one, prompt in zip(each, prompts, strict=True)]
        made = {
            way: (
                continued(world, [clip[:GIVEN] for clip in clips], each),
                continued(world, [clip[:1] for clip in clips], each),
            )
            for way, world in worlds.items()
        }
        for way, world in worlds.items():
            again = [reconstructed(world, *one) for one in zip(clips, prompts, strict=True)]
            with ThreadPoolExecutor() as threads:  # a second a clip
                found = list(threads.map(measure, clips, masks, again, *made[way]))
            for number, one in zip(numbers, found, strict=True):
                figures[way].add(one)
                summary = ", ".join(f"{name} {value:.2f}" for name, value in one.psnr.items())
                print(f"{FIRST_SEED + number} {way}: {summary}", flush=True)
        for place, number in enumerate(numbers[: max(0, SHEET_CLIPS - first)]):
            rows += [clips[place], *(videos[0][place] for videos in made.values())]
            labels.append(f"truth {FIRST_SEED + number}: {batch.captions[place]}")
            labels += [f"from 9 frames, seed {number}, {way}" for way in made]
    result: dict[str, Any] = {
        "model": model,
        "torch": torch.__version__,
        "device": str(next(iter(worlds.values())).device),
        "seeds": [FIRST_SEED, FIRST_SEED + count - 1],
        "sampling": "temperature 1.0, top_p 0.8, one sample a clip",
        "prompt": "the caption of the clip" if prompted else None,
        "frames": f"{GIVEN + 1} to 33 predicted from {GIVEN}",
    }
    for way, figure in figures.items():
        # the discrete decoding has the names that it had when it was the only one
        result |= figure.as_json() if way == "discrete" else {"by_diffusion": figure.as_json()}
    if len(figures) == len(WAYS):
        fine, coarse = figures["diffusion"].psnr, figures["discrete"].psnr
        result["gain_of_diffusion_over_discrete_db"] = {
            name: differences(fine[name], coarse[name])
            for name in ("reconstruction", "predicted", "predicted_objects")
        }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(figures))
    if sheet is not None:
        contact_sheet(rows, sheet, labels)


if __name__ == "__main__":
    main()
