"""Measure what a step cache costs on the bundled worlds, clip by clip beside the exact videos.

    python -m benchmarks.tiny_step_cache --num_steps 35 --guidance 7 --output results.json
    python -m benchmarks.tiny_step_cache --model tiny-Cosmos-Predict2.5-2B --output flow.json

Clips that no world has seen, each continued by its caption, and videos of prompts alone; the result
is written anew behind every clip. A video may gain PSNR by losing detail, so the loss is bounded
too: as if all that changes were error, independent of the error that is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
import torch

import worldline
from benchmarks.tiny_diffusion_quality import settings
from benchmarks.tiny_quality import FIRST_SEED, differences, psnr, quartiles
from benchmarks.tiny_runs import Frames
from tiny.clips import make_clips
from tiny.objects import compare, find_objects
from worldline.evaluate.failures import find_failures
from worldline.evaluate.metrics import decibels

TASKS = ("video2world", "text2world")


class Videos:
    """Figures of the videos that one rule makes, in the order of clips."""

    def __init__(self) -> None:
        self.psnr: list[float] = []
        self.errors: list[float] = []  # squares, of frames that are not given
        self.changes: list[float] = []  # from the exact video
        self.failed = self.passed = 0
        self.computed: list[int] = []
        self.patterns: list[str] = []

    def add(
        self, video: Any, exact: Frames, truth: Frames | None, caption: str, given: int
    ) -> None:
        """Add a video of a clip, or of a prompt without a truth."""
        frames = video.frames
        self.changes.append(square_error(frames[given:], exact[given:]))
        self.failed += bool(find_failures(frames, max(given, 1)))
        if truth is None:
            self.passed += compare(find_objects(frames), caption).passed
        else:
            self.psnr.append(psnr(frames[given:], truth[given:]))
            self.errors.append(square_error(frames[given:], truth[given:]))
        if cache := video.report["step_cache"]:
            self.computed.append(cache["computed"])
            self.patterns += cache["patterns"]

    def as_json(self, exact: Videos) -> dict[str, Any]:
        result: dict[str, Any] = {"failed": self.failed}
        if self.psnr:
            result["psnr_db"] = quartiles(self.psnr)
        else:
            result["prompts_passed"] = self.passed
        if self.computed:
            result["computed"] = quartiles(self.computed)
            result["patterns"] = self.patterns[:4]
            result["psnr_to_exact_db"] = quartiles([decibels(change) for change in self.changes])
        if self.computed and self.psnr:
            result["psnr_change_db"] = differences(self.psnr, exact.psnr)
            pairs = zip(self.changes, exact.errors, strict=True)
            losses = [10 * np.log10(1 + change / error) for change, error in pairs]
            result["psnr_loss_at_most_db"] = round(mean(losses), 3)
        return result


def square_error(frames: Frames, others: Frames) -> float:
    return float(np.square(frames.astype(np.int64) - others).mean())


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-7B-Video2World", show_default=True)
@click.option("--rule", "rules", multiple=True, default=("0.2", "0.3", "0.5"), show_default=True)
@click.option("--clips", default=100, show_default=True, help="Unseen clips.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Default: both.")
@click.option("--first_seed", default=FIRST_SEED, show_default=True)
@click.option("--num_steps", type=int, help="Default: the world's.")
@click.option("--guidance", type=float, help="Default: the world's.")
@click.option("--device", default=None)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(
    model: str,
    rules: tuple[str, ...],
    clips: int,
    tasks: tuple[str, ...],
    first_seed: int,
    num_steps: int | None,
    guidance: float | None,
    device: str | None,
    output: Path,
) -> None:
    """Measure, and write a JSON file."""
    world = worldline.load(model, device=device, disable_guardrail=True)
    own, options, longest = settings(world, num_steps=num_steps, guidance=guidance)
    size = (own.num_video_frames, own.height, own.width)
    frames_given = dict(zip(TASKS, (longest, 0), strict=True))
    figures = {task: {rule: Videos() for rule in ("off", *rules)} for task in tasks or TASKS}
    for number in range(clips):
        clip = make_clips([first_seed + number], *size)
        truth, caption = clip.frames[0].numpy(), clip.captions[0]
        for task, by_rule in figures.items():
            given, exact = frames_given[task], truth
            for rule, videos in by_rule.items():
                asked = {**options, "prompt": caption, "num_input_frames": given, "seed": number}
                video = world.generate(truth[:given] if given else None, step_cache=rule, **asked)
                exact = video.frames if rule == "off" else exact
                videos.add(video, exact, truth if given else None, caption, given)
        result: dict[str, Any] = {
            "model": model,
            "torch": torch.__version__,
            "device": str(world.device),
            "seeds": [first_seed, first_seed + number],
            "num_steps": num_steps or own.num_steps,
            "guidance": own.guidance if guidance is None else guidance,
        }
        for task, by_rule in figures.items():
            entries = {rule: videos.as_json(by_rule["off"]) for rule, videos in by_rule.items()}
            result[task] = {"videos": number + 1, **entries}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
