"""Post-train full-size models with random weights, through the command, as a user would.

    python benchmarks/training.py --weights checkpoints --case 4B-small --case 4B-large \
        --output benchmarks/results/training.json

Clips are encoded in every step. Seconds are the median of the steps behind the first; MFU counts
the model's own operations, not those that are computed again, against GEMM_FLOPS. `--memory 80`
limits each process to so many GB. The case `tiny` tries the script on a CPU.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
        text: whether a text is read: "t5" embeddings, or "caption".
    """

    model: str
    write: Callable[[Path], object]
    clip: VideoShape
    flags: tuple[str, ...] = ()
    text: str = ""


def autoregressive(size: str, clip: VideoShape, *flags: str) -> Case:
    text = "t5" if "Video2World" in size else ""
    return Case(
        f"Cosmos-Predict1-{size}",
        lambda root: ar_end_to_end.write_weights(root, size, with_text=False),
        clip,
        flags,
        text,
    )


SMALL, LARGE, FULL = (VideoShape(33, *size) for size in ((384, 640), (640, 848), (640, 1024)))
CASES: dict[str, Case] = {
    "4B-small": autoregressive("4B", SMALL),
    "4B-large": autoregressive("4B", LARGE),
    "5B": autoregressive("5B-Video2World", SMALL),
    "12B": autoregressive("12B", SMALL, "--lora"),
    "13B": autoregressive("13B-Video2World", SMALL, "--lora"),
    "7B": Case(
        "Cosmos-Predict1-7B-Video2World",
        lambda root: diffusion_end_to_end.write_weights(root, "7B", with_text=False),
        VideoShape(121, 704, 1280),
        ("--lora",),
        "t5",
    ),
    "2B": Case(
        "2B/pre-trained",
        lambda root: predict2_5_end_to_end.write_weights(root, "2B", with_text=True),
        VideoShape(93, 704, 1280),
        ("--lora",),
        "caption",
    ),
    "tiny": Case("tiny-Cosmos-Predict1-4B", lambda root: None, VideoShape(33, 128, 192)),
}


def write_clips(folder: Path, case: Case) -> None:
    """Write two clips of moving noise, and their texts."""
    shape, generator = case.clip, np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True)
    for number in range(2):
        picture = generator.integers(0, 256, (shape.height // 16, shape.width // 16, 3), np.uint8)
        large = picture.repeat(16, 0).repeat(16, 1)
        frames = np.stack([np.roll(large, 4 * frame, 1) for frame in range(shape.frames)])
        write_video(frames, folder / "videos" / f"c{number}.mp4", FPS)
        if case.text == "t5":
            (folder / "t5_xxl").mkdir(exist_ok=True)
            rows = [generator.standard_normal((ROWS, 1024)).astype(np.float16)]
            (folder / "t5_xxl" / f"c{number}.pickle").write_bytes(pickle.dumps(rows))
        elif case.text:
            (folder / "metas").mkdir(exist_ok=True)
            (folder / "metas" / f"c{number}.txt").write_text("A robot arm moves.")


def run(case: Case, root: Path, steps: int, words: list[str], memory: float) -> dict[str, Any]:
    """Figures of a run in processes of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_clips(folder / "clips", case)
        size = f"{case.clip.height}x{case.clip.width}"
        command = [sys.executable, "-m", "worldline", "train", case.model, "--checkpoint_dir"]
        command += [str(root), "--videos", str(folder / "clips"), "--resolution", size]
        command += ["--num_frames", str(case.clip.frames), "--max_steps", str(steps), "--name", "x"]
        given = [*case.flags, *words]
        command += [word for word in given if "=" not in word]
        command += ["--", "trainer.logging_iter=1", "checkpoint.save_state=false"]
        command += ["trainer.sample_iter=0"]  # nobody looks
        command += [word for word in given if "=" in word]
        environment = {**os.environ, "OUTPUT_ROOT": str(folder / "runs")}
        if memory:
            share = memory * 1e9 / torch.cuda.get_device_properties(0).total_memory
            environment["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        [log] = (folder / "runs").rglob("log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    # times of whole runs at each step -> of the steps
    ends = [line["step"] / line["steps_per_second"] for line in lines]
    seconds = float(np.median(np.diff(ends))) if len(ends) > 1 else ends[0]
    tflops = lines[-1]["tflops"] / lines[-1]["steps_per_second"] / seconds
    return {
        "flags": [*case.flags, *words],
        "clip": [case.clip.frames, case.clip.height, case.clip.width],
        "seconds_a_step": round(seconds, 4),
        "tflops": round(tflops, 1),
        "mfu": round(tflops * 1e12 / GEMM_FLOPS, 4),
        "peak_gb": lines[-1].get("peak_gb"),
        "losses": [round(line["loss"], 4) for line in lines[:: max(1, len(lines) // 10)]],
        "process_seconds": round(time.time() - began, 1),
        "plan": [line for line in done.stderr.splitlines() if "needs about" in line],
    }


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), required=True)
@click.option("--steps", default=8, show_default=True)
@click.option("--words", default="", help="Further flags, and KEY=VALUE.")
@click.option("--memory", default=0.0, help="GB that a process may take; 0 is all.")
@click.option("--label", default="", help="Name of the result, behind the case's.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    weights: Path,
    names: tuple[str, ...],
    steps: int,
    words: str,
    memory: float,
    label: str,
    output: Path,
    commit: str,
) -> None:
    """Train the cases for a few steps, and write a JSON file."""
    weights.mkdir(parents=True, exist_ok=True)
    result = json.loads(output.read_text()) if output.exists() else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        case = CASES[name]
        case.write(weights)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = run(case, weights, steps, words.split(), memory)
        key = f"{name} {label}".strip()
        result[key] = {"commit": commit, **environment(device), **found}
        print(key, json.dumps(found), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
