"""Post-train full-size models with random weights, through the command, as a user would.

    python benchmarks/training.py --weights checkpoints --case 4B-small --case 4B-large \
        --output benchmarks/results/training.json

Clips are encoded in every step. Seconds are the median of the steps behind the first; MFU counts
the model's own operations, not those that are computed again, against GEMM_FLOPS; of an adapter's
run it is no measure, since gradients of frozen weights are not computed. `--memory 80` limits each
process to so many GB by `torch.cuda.set_per_process_memory_fraction`. `--tiny` tries a case on a
CPU, with tiny weights of the same family.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ar_end_to_end
import click
import diffusion_end_to_end
import numpy as np
import predict2_5_end_to_end
import torch
from full_size import GEMM_FLOPS, ROWS

from worldline.report import environment
from worldline.shapes import VideoShape
from worldline.video.write import write_video

FPS = 24


@dataclass(frozen=True)
class Case:
    """One model and its clips.

    Attributes:
        model: its name below the folder of weights.
        write: writes its weights.
        clip: size of the clips.
        flags: of the command.
        width: of a T5 embedding; 0 where a model reads a caption, or no text.
        caption: whether it reads one.
        tiny: the same of tiny weights.
    """

    model: str
    write: Callable[[Path], object]
    clip: VideoShape
    flags: tuple[str, ...] = ()
    width: int = 0
    caption: bool = False
    tiny: Case | None = None


def autoregressive(size: str, clip: VideoShape, *flags: str) -> Case:
    def case(size: str, clip: VideoShape, width: int) -> Case:
        return Case(
            f"Cosmos-Predict1-{size}",
            lambda root: ar_end_to_end.write_weights(
                root, size, with_text=False, with_decoder=False
            ),
            clip,
            flags,
            width if "Video2World" in size else 0,
        )

    tiny = "tiny-Video2World" if "Video2World" in size else "tiny"
    small = case(tiny, VideoShape(33, 32, 48), ar_end_to_end.TINY_T5["d_model"])
    return replace(case(size, clip, 1024), tiny=small)


def diffusion(size: str, clip: VideoShape, *flags: str) -> Case:
    model = f"Cosmos-Predict1-{size}-Video2World"

    def write(root: Path) -> None:
        diffusion_end_to_end.write_weights(root, size, with_text=False)

    bundled = f"tiny-{model}", lambda root: None, VideoShape(33, 128, 192)
    return Case(model, write, clip, flags, 1024, tiny=Case(*bundled, flags, caption=True))


def flow(size: str, clip: VideoShape, *flags: str) -> Case:
    def case(size: str, clip: VideoShape) -> Case:
        return Case(
            f"{'2B' if size == 'tiny' else size}/post-trained",
            lambda root: predict2_5_end_to_end.write_weights(root, size, with_text=True),
            clip,
            flags,
            caption=True,
        )

    return replace(case(size, clip), tiny=case("tiny", predict2_5_end_to_end.TINY_CLIP))


SMALL, LARGE = VideoShape(33, 384, 640), VideoShape(33, 640, 848)  # the released guide's
CASES: dict[str, Case] = {
    "4B-small": autoregressive("4B", SMALL),
    "4B-large": autoregressive("4B", LARGE),
    "5B": autoregressive("5B-Video2World", SMALL),
    "12B": autoregressive("12B", SMALL, "--lora"),
    "13B": autoregressive("13B-Video2World", SMALL, "--lora"),
    "7B": diffusion("7B", VideoShape(121, 704, 1280), "--lora"),
    "2B": flow("2B", VideoShape(93, 704, 1280), "--lora"),
}


def write_clips(folder: Path, case: Case, count: int) -> None:
    """Write clips of moving noise, and their texts."""
    shape, generator = case.clip, np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True)
    for number in range(count):
        picture = generator.integers(0, 256, (shape.height // 16, shape.width // 16, 3), np.uint8)
        large = picture.repeat(16, 0).repeat(16, 1)
        frames = np.stack([np.roll(large, 4 * frame, 1) for frame in range(shape.frames)])
        write_video(frames, folder / "videos" / f"c{number}.mp4", FPS)
        if case.width:
            (folder / "t5_xxl").mkdir(exist_ok=True)
            rows = [generator.standard_normal((ROWS, case.width)).astype(np.float16)]
            (folder / "t5_xxl" / f"c{number}.pickle").write_bytes(pickle.dumps(rows))
        elif case.caption:
            (folder / "metas").mkdir(exist_ok=True)
            (folder / "metas" / f"c{number}.txt").write_text("A robot arm moves.")


def program(memory: float) -> list[str]:
    """Begin of a command line; a process may take so many GB, or all where 0."""
    if not memory:
        return [sys.executable, "-m", "worldline"]
    limit = (
        "import torch; c = torch.cuda; "
        f"c.set_per_process_memory_fraction({memory}e9 / c.get_device_properties(0).total_memory); "
        "from worldline.cli.main import main; main()"
    )
    return [sys.executable, "-c", limit]


def run(
    case: Case, root: Path, steps: int, words: list[str], memory: float, count: int
) -> dict[str, Any]:
    """Figures of a run in processes of its own, on so many clips."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_clips(folder / "clips", case, count)
        size = f"{case.clip.height}x{case.clip.width}"
        command = [*program(memory), "train", case.model, "--checkpoint_dir", str(root)]
        command += ["--videos", str(folder / "clips"), "--resolution", size]
        command += ["--num_frames", str(case.clip.frames), "--max_steps", str(steps), "--name", "x"]
        given = [*case.flags, *words]
        command += [word for word in given if "." not in word.partition("=")[0]]
        command += ["--", "trainer.logging_iter=1", "checkpoint.save_state=false"]
        if "trainer.sample_iter" not in " ".join(given):
            command += ["trainer.sample_iter=0"]  # nobody looks
        command += [word for word in given if "." in word.partition("=")[0]]
        environment = {**os.environ, "OUTPUT_ROOT": str(folder / "runs")}
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        [log] = (folder / "runs").rglob("log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    # times of whole runs at each step -> of the steps
    ends = [line["step"] / line["steps_per_second"] for line in lines]
    seconds = float(np.median(np.diff(ends))) if len(ends) > 1 else ends[0]
    last, losses = lines[-1], [line["loss"] for line in lines]
    tflops, clips = (last[n] / last["steps_per_second"] for n in ("tflops", "clips_per_second"))
    part = max(1, len(losses) // 5)
    plan = [line for line in done.stderr.splitlines() if re.search(r"needs? about", line)]
    planned = re.search(r"about ([\d.]+) GB", " ".join(plan))
    return {
        "flags": given,
        "clip": [case.clip.frames, case.clip.height, case.clip.width],
        "clips": count,
        "seconds_a_step": round(seconds, 4),
        "slowest_step": round(max(np.diff(ends), default=0.0), 4),
        "clips_per_second": round(clips / seconds, 4),
        "tflops": round(tflops / seconds, 1),
        "mfu": round(tflops / seconds * 1e12 / GEMM_FLOPS, 4),
        "peak_gb": last.get("peak_gb"),
        "planned_gb": float(planned[1]) if planned else None,
        "mean_loss_of_the_first_and_last_fifth": [
            round(float(np.mean(each)), 4) for each in (losses[:part], losses[-part:])
        ],
        "losses": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 10)]],
        "process_seconds": round(time.time() - began, 1),
        "plan": plan,
    }


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), required=True)
@click.option("--steps", default=8, show_default=True)
@click.option("--clips", "count", default=2, show_default=True)
@click.option("--words", default="", help="Further flags, and KEY=VALUE.")
@click.option("--memory", default=0.0, help="GB that a process may take; 0 is all.")
@click.option("--tiny", is_flag=True, help="Tiny weights and clips in place of the case's.")
@click.option("--remove", is_flag=True, help="Remove all weights behind each case.")
@click.option("--label", default="", help="Name of the result, behind the case's.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    weights: Path,
    names: tuple[str, ...],
    tiny: bool,
    remove: bool,
    label: str,
    output: Path,
    commit: str,
    **options: Any,
) -> None:
    """Train the cases for a few steps, and write a JSON file."""
    result = json.loads(output.read_text()) if output.exists() else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        weights.mkdir(parents=True, exist_ok=True)
        case = CASES[name].tiny if tiny else CASES[name]
        assert case is not None
        began = time.time()
        case.write(weights)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{name}: weights written in {time.time() - began:.0f} s", flush=True)
        words = options["words"].split()
        found = run(case, weights, options["steps"], words, options["memory"], options["count"])
        key = f"{name} {label}".strip()
        result[key] = {"commit": commit, **environment(device), **found}
        print(key, json.dumps(found), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        if remove:
            shutil.rmtree(weights)


if __name__ == "__main__":
    main()
