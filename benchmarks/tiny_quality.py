"""Measure the bundled autoregressive world on clips that it never saw.

    python benchmarks/tiny_quality.py --output benchmarks/results/tiny_quality.json

Seeds 1,000,000 and up; training stays below. One sample a clip, with the released sampling, through
`worldline.load(...).generate(...)`, never the best of several.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np
import torch

import worldline
from worldline.evaluate.clips import summarise
from worldline.evaluate.failures import find_failures
from worldline.evaluate.metrics import psnr
from worldline.physics import make_clips
from worldline.video.convert import to_uint8
from worldline.video.write import contact_sheet

FIRST_SEED = 1_000_000
GIVEN = 9


def quartiles(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [25, 75])
    return {
        "median": round(median(values), 2),
        "mean": round(mean(values), 2),
        "quartiles": [round(float(low), 2), round(float(high), 2)],
        "lowest": round(min(values), 2),
    }


@torch.inference_mode()
def reconstructed(world: worldline.World, frames: np.ndarray) -> np.ndarray:
    tokenizer = world.parts.tokenizer.module
    weight = tokenizer.quant_conv.weight
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(weight.device).float()
    decoded = tokenizer.reconstruct((video / 255 * 2 - 1).to(weight.dtype))[0]
    return to_uint8(decoded * 0.5 + 0.5)


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-4B", show_default=True)
@click.option("--clips", default=100, show_default=True)
@click.option("--device", default=None)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG of the first clips.")
def main(model: str, clips: int, device: str | None, output: Path, sheet: Path | None) -> None:
    """Measure, print, and write a JSON file."""
    world = worldline.load(model, device=device)
    figures: dict[str, list[float]] = {
        name: []
        for name in ("reconstruction", "repeat", "predicted", "repeat_objects", "predicted_objects")
    }
    failures: dict[str, list[Any]] = {"9 frames": [], "1 frame": []}
    rows, labels = [], []
    for number in range(clips):
        seed = FIRST_SEED + number
        truth = make_clips([seed], return_masks=True)
        assert truth.masks is not None
        frames, masks = truth.frames[0].numpy(), truth.masks[0, GIVEN:].numpy()
        still = np.broadcast_to(frames[GIVEN - 1], frames[GIVEN:].shape).copy()
        # the model sees the given frames alone
        video = world.generate(frames[:GIVEN], num_input_frames=GIVEN, seed=number)
        from_image = world.generate(frames[:1], num_input_frames=1, seed=number)
        predicted = video.frames[GIVEN:]
        figures["reconstruction"].append(psnr(reconstructed(world, frames), frames))
        figures["repeat"].append(psnr(still, frames[GIVEN:]))
        figures["predicted"].append(psnr(predicted, frames[GIVEN:]))
        figures["repeat_objects"].append(psnr(still, frames[GIVEN:], masks))
        figures["predicted_objects"].append(psnr(predicted, frames[GIVEN:], masks))
        failures["9 frames"].append(find_failures(video.frames, GIVEN))
        failures["1 frame"].append(find_failures(from_image.frames, 1))
        if number < 20:
            rows += [frames, video.frames]
            labels += [f"truth {seed}", f"from 9 frames, seed {number}"]
        print(seed, {name: round(values[-1], 2) for name, values in figures.items()}, flush=True)
    gains = [a - b for a, b in zip(figures["predicted"], figures["repeat"], strict=True)]
    result = {
        "model": model,
        "torch": torch.__version__,
        "device": str(world.device),
        "seeds": [FIRST_SEED, FIRST_SEED + clips - 1],
        "sampling": "temperature 1.0, top_p 0.8, one sample a clip",
        "frames": f"{GIVEN + 1} to 33 predicted from {GIVEN}",
        "psnr_db": {name: quartiles(values) for name, values in figures.items()},
        "gain_over_repeating_db": quartiles(gains),
        "clips_where_repeating_scores_15_to_22": sum(15 <= v <= 22 for v in figures["repeat"]),
        "failures": {name: summarise(found).as_json() for name, found in failures.items()},
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "failures"}, indent=1))
    print({k: str(summarise(v).failed) for k, v in failures.items()})
    if sheet is not None:
        contact_sheet(rows, sheet, labels)


if __name__ == "__main__":
    main()
