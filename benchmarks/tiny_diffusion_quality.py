"""Measure a bundled world that denoises latents on clips and prompts that it never saw.

    python -m benchmarks.tiny_diffusion_quality --output results.json --sheets sheets
    python -m benchmarks.tiny_diffusion_quality --model tiny-Cosmos-Predict2.5-2B --output flow.json

Seeds 1,000,000 and up; training stays below. One sample a clip, with the world's own settings
unless flags change them, as `World.generate` makes it, never the best of several.
The check of objects (`tiny.objects`) is measured too, on rendered clips with their own captions and
with those of others.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

import worldline
from benchmarks.tiny_quality import FIRST_SEED, psnr, quartiles, reconstructed
from tiny.clips import make_clips
from tiny.objects import Found, Verdict, compare, find_objects, named_objects
from worldline.evaluate.failures import Failure, Rate, failure_rate, find_failures
from worldline.evaluate.metrics import motion
from worldline.video.sheet import contact_sheet

Frames = NDArray[np.uint8]

SHUFFLES = 5  # captions of other clips that each clip is compared with
ROWS_A_SHEET = 20
SHEET_CLIPS = 40  # drawn in the sheets
SAMPLING = ("num_steps", "guidance", "negative_prompt", "sampler", "schedule", "fps")
TASKS = ("video2world", "image2world", "text2world")


def share(passed: Sequence[bool]) -> dict[str, object]:
    return Rate(sum(passed), len(passed)).as_json()


class Continued:
    """Figures of the videos that continue clips."""

    def __init__(self, given: int) -> None:
        self.given = given
        names = ("repeat", "predicted", "repeat_objects", "predicted_objects")
        self.figures: dict[str, list[float]] = {name: [] for name in names}
        self.failures: list[list[Failure]] = []

    def add(self, video: Frames, truth: Frames, masks: NDArray[np.bool_]) -> str:
        target, masks = truth[self.given :], masks[self.given :]
        still = np.broadcast_to(truth[self.given - 1], target.shape).copy()
        for name, frames in (("repeat", still), ("predicted", video[self.given :])):
            self.figures[name].append(psnr(frames, target))
            self.figures[f"{name}_objects"].append(psnr(frames, target, masks))
        self.failures.append(find_failures(video, self.given))
        return f"{self.gains[-1]:+.2f} dB"

    @property
    def gains(self) -> list[float]:
        pairs = zip(self.figures["predicted"], self.figures["repeat"], strict=True)
        return [predicted - repeat for predicted, repeat in pairs]

    def as_json(self) -> dict[str, Any]:
        return {
            "psnr_db": {name: quartiles(values) for name, values in self.figures.items()},
            "gain_over_repeating_db": quartiles(self.gains),
            "clips_where_repeating_scores_15_to_22": sum(
                15 <= value <= 22 for value in self.figures["repeat"]
            ),
            "failures": failure_rate(self.failures).as_json(),
        }


class Prompted:
    """What the videos of prompts alone show."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.verdicts: list[Verdict] = []
        self.failures: list[list[Failure]] = []
        self.motion: list[float] = []

    def add(self, video: Frames, caption: str) -> str:
        verdict = compare(find_objects(video), caption)
        self.captions.append(caption)
        self.verdicts.append(verdict)
        self.failures.append(find_failures(video, 1))
        self.motion.append(motion(video))
        return verdict_words(verdict)

    def as_json(self) -> dict[str, Any]:
        subjects = [named_objects(caption)[0] for caption in self.captions]
        prompts_by = {"colour": Counter[str](), "shape": Counter[str]()}
        misses_by = {"colour": Counter[str](), "shape": Counter[str]()}
        for names, verdict in zip(subjects, self.verdicts, strict=True):
            for part, name in zip(prompts_by, names, strict=True):
                prompts_by[part][name] += 1
                misses_by[part][name] += not verdict.subject_found
        found = [list(verdict.objects) for verdict in self.verdicts]
        return {
            "subject_found": share([verdict.subject_found for verdict in self.verdicts]),
            "companions_colours_found": share(
                [verdict.companions_colours_found for verdict in self.verdicts]
            ),
            "passed": share([verdict.passed for verdict in self.verdicts]),
            "with_shuffled_prompts": shuffled(found, self.captions),
            "prompts_and_misses_of_the_subject": {
                part: {name: [count, misses_by[part][name]] for name, count in sorted(of.items())}
                for part, of in prompts_by.items()
            },
            "motion": quartiles(self.motion),
            "failures": failure_rate(self.failures).as_json(),
            "not_passed": [
                {"prompt": caption, "objects": describe(verdict.objects)}
                for caption, verdict in zip(self.captions, self.verdicts, strict=True)
                if not verdict.passed
            ],
        }


def describe(objects: Sequence[Found]) -> list[str]:
    return [f"{found.colour} {found.shape}" for found in objects]


def verdict_words(verdict: Verdict) -> str:
    if verdict.passed:
        return "passed"
    return f"{'companion' if verdict.subject_found else 'subject'} missed: " + (
        ", ".join(describe(verdict.objects)) or "nothing found"
    )


def shuffled(objects: Sequence[Sequence[Found]], captions: Sequence[str]) -> dict[str, Any] | None:
    """How many videos pass with the captions of the next ones; none of one video alone."""
    verdicts = [
        compare(found, captions[(place + step) % len(captions)])
        for place, found in enumerate(objects)
        for step in range(1, min(SHUFFLES + 1, len(captions)))
    ]
    if not verdicts:
        return None
    return {
        "subject_found": share([verdict.subject_found for verdict in verdicts]),
        "passed": share([verdict.passed for verdict in verdicts]),
    }


def measure_check(clips: int, size: tuple[int, int, int]) -> dict[str, Any]:
    """Try the check on rendered clips, where the answer is known."""
    objects, captions, seconds, still = [], [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + clips):
        truth = make_clips([seed], *size)
        frames = truth.frames[0].numpy()
        start = time.perf_counter()
        objects.append(find_objects(frames))
        seconds.append(time.perf_counter() - start)
        captions.append(truth.captions[0])
        still.append(motion(frames))
    verdicts = [compare(*pair) for pair in zip(objects, captions, strict=True)]
    subjects = [named_objects(caption)[0] for caption in captions]
    return {
        "seeds": [FIRST_SEED, FIRST_SEED + clips - 1],
        "subject_found": share([verdict.subject_found for verdict in verdicts]),
        "passed": share([verdict.passed for verdict in verdicts]),
        "with_shuffled_prompts": shuffled(objects, captions),
        "subjects": {
            "colours": len({colour for colour, _ in subjects}),
            "shapes": len({shape for _, shape in subjects}),
            "both": len(set(subjects)),
        },
        "motion_of_truth": quartiles(still),
        "seconds_a_clip": round(median(seconds), 3),
    }


def settings(world: worldline.World, **stated: Any) -> tuple[Any, dict[str, Any], int]:
    """The world's own request, what is stated of another, the most frames that it continues."""
    family = world.opened.family
    options = {name: value for name, value in stated.items() if value is not None}
    own = family.request.parse(world.opened.defaults)
    return own, options, 9 if family.name == "diffusion" else 5


@click.command()
@click.option("--model", default="tiny-Cosmos-Predict1-7B-Video2World", show_default=True)
@click.option("--checkpoint_dir", default="checkpoints", help="For worlds that are not bundled.")
@click.option("--clips", default=100, show_default=True, help="Unseen clips, and prompts.")
@click.option("--check_clips", default=300, show_default=True, help="To try the check itself.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Default: all.")
@click.option(
    "--first_seed", default=FIRST_SEED, show_default=True, help="To choose settings: 900000."
)
@click.option("--num_steps", type=int, help="Default: the world's.")
@click.option("--guidance", type=float, help="Default: the world's.")
@click.option("--device", default=None)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--sheets", type=click.Path(path_type=Path), help="Folder for PNGs to look at.")
def main(
    model: str,
    checkpoint_dir: str,
    clips: int,
    check_clips: int,
    tasks: tuple[str, ...],
    first_seed: int,
    num_steps: int | None,
    guidance: float | None,
    device: str | None,
    output: Path,
    sheets: Path | None,
) -> None:
    """Measure, print, and write a JSON file."""
    # prompts go in as they are, and videos come out as they are
    options: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "device": device}
    world = worldline.load(model, **options, disable_guardrail=True)
    own, options, longest = settings(world, num_steps=num_steps, guidance=guidance)
    size = (own.num_video_frames, own.height, own.width)
    frames_given = dict(zip(TASKS, (longest, 1, 0), strict=True))
    measured: dict[str, Continued | Prompted] = {
        task: Continued(given) if given else Prompted()
        for task, given in frames_given.items()
        if not tasks or task in tasks
    }
    reconstruction: list[float] = []
    seconds: dict[str, list[float]] = {task: [] for task in measured}
    rows: dict[str, list[tuple[Frames, str]]] = {task: [] for task in measured}
    report: dict[str, Any] = {}
    for number in range(clips):
        seed = first_seed + number
        clip = make_clips([seed], *size, return_masks=True)
        assert clip.masks is not None
        truth, masks, caption = clip.frames[0].numpy(), clip.masks[0].numpy(), clip.captions[0]
        again = reconstructed(world, truth)
        reconstruction.append(psnr(again, truth))
        line = [f"tokenizer {reconstruction[-1]:.2f} dB"]
        for task, figures in measured.items():
            start = time.perf_counter()
            given = frames_given[task]
            # the world sees the given frames alone
            video = world.generate(
                truth[:given] if given else None,
                prompt=caption,
                num_input_frames=given,
                seed=number,
                **options,
            )
            seconds[task].append(time.perf_counter() - start)
            report = {**video.report, **video.report["request"]}
            if isinstance(figures, Continued):
                words = figures.add(video.frames, truth, masks)
            else:
                words = figures.add(video.frames, caption)
            line.append(f"{task} {words}")
            if sheets is not None and number < SHEET_CLIPS:
                if given:
                    rows[task].append((truth, f"truth {seed}: {caption}"))
                label = f"{task}, {words}" if given else f"{seed}, {words}: {caption}"
                rows[task].append((video.frames, label))
        print(seed, "; ".join(line), flush=True)
    result: dict[str, Any] = {
        "model": model,
        "frames_height_width": size,
        "torch": torch.__version__,
        "device": str(world.device),
        "seeds": [first_seed, first_seed + clips - 1],
        "sampling": {name: report[name] for name in SAMPLING if name in report},
        "frames_given": frames_given,
        "prompt": "the caption of the clip, also where frames are given",
        "reconstruction_psnr_db": quartiles(reconstruction),
        **{task: figures.as_json() for task, figures in measured.items()},
        "seconds_a_video": {task: round(median(spent), 2) for task, spent in seconds.items()},
    }
    if check_clips:
        result["check"] = measure_check(check_clips, size)
    output.write_text(json.dumps(result, indent=1) + "\n")
    brief = {
        name: {key: entry for key, entry in part.items() if key not in ("failures", "not_passed")}
        if isinstance(part, dict)
        else part
        for name, part in result.items()
    }
    print(json.dumps(brief, indent=1))
    for task, figures in measured.items():
        print(task, "failures:", failure_rate(figures.failures).failed)
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        for task, strips in rows.items():
            for start in range(0, len(strips), ROWS_A_SHEET):
                frames, labels = zip(*strips[start : start + ROWS_A_SHEET], strict=True)
                contact_sheet(frames, sheets / f"{task}_{start // ROWS_A_SHEET:02}.png", labels)


if __name__ == "__main__":
    main()
