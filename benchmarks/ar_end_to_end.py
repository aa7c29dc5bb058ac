"""Run `worldline autoregressive base` at full size with random weights, as a user would.

    python benchmarks/ar_end_to_end.py --clip in.mp4 --weights checkpoints --model 4B \
        --output benchmarks/results/ar_end_to_end_4b.json

Weights are drawn on the GPU and saved in the official layout (a flat `model.pt`, the tokenizer's
`model.pt` as a training checkpoint), then read by the command from the page cache. Neither time nor
memory depends on their values. Each run is a process of its own; "first_token" counts from its
start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from worldline.loading import plan_autoregressive
from worldline.models.predict1_ar.model import PRESETS as TRANSFORMERS
from worldline.models.predict1_ar.model import ARTransformer
from worldline.models.predict1_ar.weights import KEYS, write_settings
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import released_tensors

COPY_RATE = 4.3e12  # bytes a second that an H200 moves
VARIANTS = {
    "resident": [],
    "offload_tokenizer": ["--offload_tokenizer"],
    "offload_ar_model": ["--offload_ar_model"],
    "offload_both": ["--offload_ar_model", "--offload_tokenizer"],
}


def write_weights(root: Path, name: str) -> None:
    """Write a transformer and the discrete tokenizer in the official layout."""
    torch.manual_seed(0)
    folder = root / f"Cosmos-Predict1-{name}"
    if not (folder / "model.pt").exists():
        folder.mkdir(parents=True)
        config = TRANSFORMERS[name]
        with torch.device("meta"):
            model = ARTransformer(config)
        tensors = {}
        for ours, parameter in model.named_parameters():
            value = torch.ones(parameter.shape, device="cuda")
            if parameter.ndim > 1:
                value.normal_(std=0.02)
            tensors[KEYS.released(ours)] = value.bfloat16().cpu()
        torch.save(tensors, folder / "model.pt")
        (folder / "config.json").write_text(json.dumps(write_settings(config)))
    folder = root / "Cosmos-Tokenize1-DV8x16x16-720p"
    if not (folder / "model.pt").exists():
        folder.mkdir(parents=True)
        tokenizer = CosmosTokenizer(TOKENIZERS["DV8x16x16"])
        tokenizer.reset_parameters()
        network = {}
        for tensors in released_tensors(tokenizer).values():
            network |= {f"network.{k}": v for k, v in tensors.items() if "quantizer" not in k}
        torch.save({"model": network, "iteration": 0}, folder / "model.pt")


def run(root: Path, name: str, clip: Path, flags: list[str], folder: Path) -> dict[str, Any]:
    """Run the command in a fresh process; return its report and the time to the first token."""
    command = [sys.executable, "-m", "worldline", "autoregressive", "base"]
    command += ["--checkpoint_dir", str(root), "--ar_model_dir", f"Cosmos-Predict1-{name}"]
    command += ["--input_image_or_video_path", str(clip), "--video_save_folder", str(folder)]
    command += ["--disable_diffusion_decoder", "--disable_guardrail", *flags]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    report = json.loads((folder / "output.json").read_text())
    stages = {stage["name"]: stage for stage in report["run"]["stages"]}
    tokens = stages["tokens"]["seconds"] / (report["tokens"] - 1) * 1e3
    return {
        "process_seconds": round(seconds, 2),
        "first_token_seconds": round(stages["prefill"]["ended"] - started, 2),
        "ms_a_token": round(tokens, 4),
        "peak_reserved_gb": report["run"]["peak_gb"],
        "load": report["load"]["stages"],
        "stages": report["run"]["stages"],
        "decoder": report["decoder"],
    }


@click.command()
@click.option("--clip", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--weights", type=click.Path(path_type=Path), required=True)
@click.option("--model", "name", default="4B", type=click.Choice(["4B", "12B"]))
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--commit", default="")
def main(
    clip: Path, weights: Path, name: str, variants: tuple[str, ...], output: Path, commit: str
) -> None:
    """Measure the chosen variants (all by default) and write a JSON file."""
    started = time.time()
    write_weights(weights, name)
    torch.cuda.empty_cache()
    print(f"weights written in {time.time() - started:.0f} s", flush=True)
    config, tokenizer = TRANSFORMERS[name], TOKENIZERS["DV8x16x16"]
    drawn = config.grid.tokens - 2 * config.grid.tokens_per_frame
    with torch.device("meta"):
        model = ARTransformer(config)
    read = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("embedding"))
    visible = config.grid.tokens - drawn / 2
    cache = 2 * config.depth * config.num_kv_heads * config.head_size * visible
    bound = 2 * (read + cache) / COPY_RATE * 1e3
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "model": f"Cosmos-Predict1-{name}, random weights",
        "clip": "9 frames given of 33, 640 x 1024",
        "tokens": drawn,
        "bound_ms_a_token": round(bound, 4),
        "runs": {},
    }
    for variant in variants or VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            measured = run(weights, name, clip, VARIANTS[variant], Path(folder))
        measured["share_of_bound"] = round(bound / measured["ms_a_token"], 4)
        flags = {flag[2:]: True for flag in VARIANTS[variant]}
        plan = plan_autoregressive(config, tokenizer, dtype=torch.bfloat16, **flags)
        measured["planned_gb"] = round(plan.peak / 1e9, 3)
        result["runs"][variant] = measured
        print(variant, json.dumps(measured), flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
