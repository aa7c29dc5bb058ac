"""Run `worldline diffusion video2world` at full size with random weights, as a user would.

    python benchmarks/diffusion_end_to_end.py --image in.jpg --weights checkpoints --model 7B \
        --output benchmarks/results/diffusion_end_to_end_7b.json

121 frames of 704 x 1280. Weights (transformer, continuous tokenizer, T5-11B encoder) are drawn on
the GPU and saved in the official names and layouts, then read by the command from the page cache.
Neither time nor memory depends on their values. Each run is a process of its own. Runs differ in
their offload flags and make `--steps`; `whole` makes 35 with everything offloaded.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from full_size import (
    GEMM_FLOPS,
    flops,
    run_command,
    write_continuous,
    write_dit,
    write_embeddings,
    write_text,
)

from worldline.families.diffusion.model import PRESETS
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS

_TEXT = "--offload_text_encoder_model"
_TOKENIZER = "--offload_tokenizer"
_TRANSFORMER = "--offload_diffusion_transformer"
# guardrails and upsampler are off in all of them, as in the last rows of the released tables
VARIANTS = {
    "resident": [],
    "offload_text": [_TEXT],
    "offload_text_tokenizer": [_TEXT, _TOKENIZER],
    "offload_all": [_TEXT, _TOKENIZER, _TRANSFORMER],
    "whole": [_TEXT, _TOKENIZER, _TRANSFORMER],
}
PUBLISHED = {  # peak GB of the reference with everything offloaded, seconds a clip on one H100
    "7B": {"peak_gb": 27.3, "seconds": 383},
    "14B": {"peak_gb": 39.0, "seconds": 593},
}


def write_weights(root: Path, size: str, *, with_text: bool) -> None:
    """Write everything that a Video2World run of this size reads."""
    torch.manual_seed(0)
    write_dit(root / f"Cosmos-Predict1-{size}-Video2World", PRESETS[f"{size}-Video2World"])
    write_continuous(root, TOKENIZERS["CV8x8x8"])
    if with_text:
        write_text(root)
    write_embeddings(root)


def run(
    root: Path, size: str, image: Path, flags: list[str], steps: int, folder: Path
) -> dict[str, Any]:
    """Figures of the report of a command that runs in a fresh process."""
    words = ["diffusion", "video2world", "--checkpoint_dir", str(root)]
    words += ["--diffusion_transformer_dir", f"Cosmos-Predict1-{size}-Video2World"]
    words += ["--input_image_or_video_path", str(image), "--num_steps", str(steps)]
    words += ["--disable_guardrail", "--disable_prompt_upsampler", *flags]
    report, started = run_command(words, folder)
    seconds = time.time() - started
    stages = {stage["name"]: stage for stage in report["run"]["stages"]}
    return {
        "steps": steps,
        "process_seconds": round(seconds, 2),
        "run_seconds": report["run"]["seconds"],
        "peak_reserved_gb": max(report["run"]["peak_gb"], report["load"]["peak_gb"]),
        "load": report["load"]["stages"],
        "stages": report["run"]["stages"],
        "denoise_seconds": stages["denoise"]["seconds"],
        "attention": report["attention"],
    }


@click.command()
@click.option("--image", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--model", "size", default="7B", type=click.Choice(["7B", "14B"]))
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--steps", default=2, help="Of every run but `whole`.")
@click.option("--text/--embeddings", "with_text", default=True, help="Run T5, or give its output.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    image: Path,
    weights: Path,
    size: str,
    variants: tuple[str, ...],
    steps: int,
    with_text: bool,
    output: Path,
    commit: str,
) -> None:
    """Measure the chosen variants (all by default) and write a JSON file."""
    started = time.time()
    write_weights(weights, size, with_text=with_text)
    torch.cuda.empty_cache()
    print(f"weights written in {time.time() - started:.0f} s", flush=True)
    bound = flops(PRESETS[f"{size}-Video2World"]) / GEMM_FLOPS
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "model": f"Cosmos-Predict1-{size}-Video2World, random weights",
        "clip": "1 frame given, 121 frames of 704 x 1280: 56,320 tokens",
        "text": "T5-11B encoder, random weights, bf16" if with_text else "embeddings given",
        "bound_seconds_a_forward": round(bound, 3),
        "published": PUBLISHED[size],
        "runs": {},
    }
    for variant in variants or VARIANTS:
        count = 35 if variant == "whole" else steps
        flags = ["--prompt", f"A robot arm pours water, {variant}."]
        if not with_text:
            flags = ["--prompt_embeddings", str(weights / "embeddings.safetensors")]
        with tempfile.TemporaryDirectory() as folder:
            flags += VARIANTS[variant]
            measured = run(weights, size, image, flags, count, Path(folder))
        forward = measured["denoise_seconds"] / (2 * count)
        measured["seconds_a_forward"] = round(forward, 4)
        measured["share_of_bound"] = round(bound / forward, 3)
        result["runs"][variant] = measured
        print(variant, json.dumps(measured), flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
