"""Run full-size models on several GPUs against one, through the command, with random weights.

    python benchmarks/scaling.py --gpus 2 --weights checkpoints --case 7B --case 4B \
        --output benchmarks/results/scaling.json

Each run is `worldline generate` in fresh processes: on one GPU, then on all in each way of sharing
the work. Weights have the official names and layouts and are read from the page cache; neither time
nor memory depends on their values. The distance of the frames to those of one GPU is stated, since
bf16 sums round by their order. The cases `tiny-…` try the script on CPUs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ar_end_to_end
import click
import diffusion_end_to_end
import numpy as np
import predict2_5_end_to_end
import torch
from full_size import COPY_RATE, GEMM_FLOPS, flops, planned_bytes, run_command

from worldline.families.autoregressive.model import PRESETS as AUTOREGRESSIVE
from worldline.families.diffusion.model import PRESETS as DIFFUSION
from worldline.families.predict2_5.model import PRESETS as FLOW
from worldline.report import environment
from worldline.video.read import read_video

CONTEXT = ["--guidance_parallel", "off", "--context_parallel"]
UNGUIDED = ["--guidance", "0"]
DENOISING = {
    "ulysses": [*CONTEXT, "ulysses"],
    "ring": [*CONTEXT, "ring"],
    "guidance": ["--guidance_parallel", "on"],
    "unguided": UNGUIDED,
    "shared weights": ["--fsdp", "on"],
}
BEST = {"best": []}
STEPS = 3


@dataclass(frozen=True)
class Case:
    """One model and how it runs.

    Attributes:
        world: its name below the folder of weights.
        write: writes its weights.
        input: file to continue.
        flags: of every run.
        ways: of sharing the work among several GPUs.
        bound: seconds of a forward, or of a token, on one GPU.
        embedded: whether embeddings take the place of a prompt.
    """

    world: str
    write: Callable[[Path], object]
    input: str
    flags: tuple[str, ...]
    ways: dict[str, list[str]]
    bound: float = 0.0
    embedded: bool = True


def diffusion(size: str) -> Case:
    bound = flops(DIFFUSION[f"{size}-Video2World"]) / GEMM_FLOPS
    return Case(
        f"Cosmos-Predict1-{size}-Video2World",
        lambda root: diffusion_end_to_end.write_weights(root, size, with_text=False),
        "in.png",
        ("--disable_guardrail", "--disable_prompt_upsampler", "--num_steps", str(STEPS)),
        {**DENOISING, "offloaded": ["--offload_diffusion_transformer", "--offload_tokenizer"]}
        if size == "7B"
        else BEST,
        bound,
    )


def flow(size: str) -> Case:
    clip, tokenizer = predict2_5_end_to_end.CLIP, predict2_5_end_to_end.TOKENIZER
    grid = clip.latent(tokenizer.temporal, tokenizer.spatial)
    return Case(
        f"{size}/post-trained",
        lambda root: predict2_5_end_to_end.write_weights(root, size, with_text=False),
        "in.png",
        ("--disable_guardrails", "--num_steps", str(STEPS)),
        {**DENOISING, "offloaded": ["--offload_diffusion_model", "--offload_tokenizer"]}
        if size == "2B"
        else BEST,
        flops(FLOW[size], grid) / GEMM_FLOPS,
    )


def autoregressive(size: str, decoder: bool = False) -> Case:
    return Case(
        f"Cosmos-Predict1-{size}",
        lambda root: ar_end_to_end.write_weights(root, size, with_text=False),
        "in.mp4",
        ("--disable_guardrail", *(() if decoder else ("--disable_diffusion_decoder",))),
        {**BEST, "offloaded": ["--offload_ar_model", "--offload_tokenizer"]},
        ar_end_to_end.step_bytes(AUTOREGRESSIVE[size]) / COPY_RATE,
        embedded=False,
    )


CASES: dict[str, Callable[[], Case]] = {
    "7B": lambda: diffusion("7B"),
    "14B": lambda: diffusion("14B"),
    "2B": lambda: flow("2B"),
    "14B-Predict2.5": lambda: flow("14B"),
    "4B": lambda: autoregressive("4B"),
    "12B": lambda: autoregressive("12B"),
    "decoder": lambda: autoregressive("4B", decoder=True),
    "tiny-Cosmos-Predict1-7B-Video2World": lambda: Case(
        "tiny-Cosmos-Predict1-7B-Video2World",
        lambda root: None,
        "in.png",
        ("--num_steps", str(STEPS), "--prompt", "A red ball rolls."),
        {"ring": DENOISING["ring"], "guidance": DENOISING["guidance"]},
        embedded=False,
    ),
    "tiny-Cosmos-Predict1-4B": lambda: Case(
        "tiny-Cosmos-Predict1-4B", lambda root: None, "in.mp4", (), BEST, embedded=False
    ),
}


def run(
    case: Case, root: Path, flags: list[str], processes: int, kept: Path, first: Path
) -> dict[str, Any]:
    """Figures of one run; its frames are compared with those of the first, and kept."""
    words = ["generate", case.world, str(root / case.input), "--checkpoint_dir", str(root)]
    words += ["--lossless", *case.flags, *flags]
    if case.embedded:
        words += ["--prompt_embeddings", str(root / "embeddings.safetensors")]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.mp4"
        report, started = run_command(words, output, flag="-o")
        seconds = time.time() - started
        frames = read_video(output).frames
    np.save(kept, frames)
    planned = planned_bytes(case.world, root, [*case.flags, *flags], processes)
    stages = {stage["name"]: stage["seconds"] for stage in report["run"]["stages"]}
    result = {
        "flags": flags,
        "process_seconds": round(seconds, 1),
        "stages": stages,
        "attention": report["attention"],
        "peaks_gb": report.get("peaks_gb") or [report["run"]["peak_gb"]],
        "planned_gb": [round(need / 1e9, 1) for need in planned],
        "frames_sha256": report["frames_sha256"],
    }
    if "tokens" in stages:
        result["ms_a_token"] = round(stages["tokens"] / (report["tokens"] - 1) * 1e3, 4)
    if steps := report["seconds_of_steps"]:
        result["seconds_a_step"] = round(median(steps[1:]), 4)
    if kept != first:
        difference = frames.astype(np.int16) - np.load(first)
        result["difference_rms"] = round(float(np.sqrt((difference**2.0).mean())), 3)
    return result


@click.command()
@click.option("--gpus", default=2, help="Processes; of a tiny case they compute on the CPU.")
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), required=True)
@click.option("--way", "chosen", multiple=True, help="Of sharing; by default all of a case.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    gpus: int,
    weights: Path,
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    output: Path,
    commit: str,
) -> None:
    """Measure the cases on one GPU and on all, and write a JSON file."""
    weights.mkdir(parents=True, exist_ok=True)
    predict2_5_end_to_end.write_inputs(weights, predict2_5_end_to_end.CLIP)
    result: dict[str, Any] = {"cases": {}}
    if output.exists():
        result = json.loads(output.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        case = CASES[name]()
        started = time.time()
        case.write(weights)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{name}: weights written in {time.time() - started:.0f} s", flush=True)
        runs: dict[str, Any] = {}
        facts = {"gpus": gpus, "commit": commit, **environment(device)}
        result["cases"][name] = {**facts, "bound_of_one": round(case.bound, 6), "runs": runs}
        several = ["--num_gpus", str(gpus)]
        ways = (
            {"one": [], "one, unguided": UNGUIDED}
            if UNGUIDED in case.ways.values()
            else {"one": []}
        )
        ways |= {way: [*several, *flags] for way, flags in case.ways.items()}
        for way, flags in ways.items():
            if chosen and way not in (*chosen, "one"):
                continue
            base = "one, unguided" if "unguided" in way else "one"
            names_of = (weights / f"{name}.npy" for name in (way, base))
            processes = 1 if way.startswith("one") else gpus
            figures = run(case, weights, flags, processes, *names_of)
            for figure in ("seconds_a_step", "ms_a_token"):
                if way != base and figure in figures:
                    figures["times"] = round(runs[base][figure] / figures[figure], 3)
            runs[way] = figures
            print(name, way, json.dumps(figures), flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
