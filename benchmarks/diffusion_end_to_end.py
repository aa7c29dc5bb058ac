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
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from full_size import GEMM_FLOPS, ROWS, flops
from torch import Tensor, nn

from worldline.models.predict1_dit.model import PRESETS, DiT
from worldline.models.predict1_dit.weights import KEYS
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import released_tensors
from worldline.weights.write import save

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
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 1024,
    "d_kv": 128,
    "d_ff": 65536,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 128,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
}


def draw(module: nn.Module) -> dict[str, Tensor]:
    """Return a bf16 value on the host for every parameter of a module on the meta device."""
    values = {}
    for name, parameter in module.named_parameters():
        value = torch.ones(parameter.shape, device="cuda", dtype=torch.bfloat16)
        if parameter.ndim > 1:
            value.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
        values[name] = value.cpu()
    return values


def write_weights(root: Path, size: str, *, with_text: bool) -> None:
    """Write everything that a Video2World run of this size reads."""
    torch.manual_seed(0)
    folder = root / f"Cosmos-Predict1-{size}-Video2World"
    if not (folder / "model.pt").exists():
        folder.mkdir(parents=True)
        with torch.device("meta"):
            model = DiT(PRESETS[f"{size}-Video2World"])
        torch.save({KEYS.released(n): t for n, t in draw(model).items()}, folder / "model.pt")
    folder = root / "Cosmos-Tokenize1-CV8x8x8-720p"
    if not folder.exists():
        folder.mkdir(parents=True)
        tokenizer = CosmosTokenizer(TOKENIZERS["CV8x8x8"])
        tokenizer.reset_parameters()
        for half, tensors in released_tensors(tokenizer).items():
            save(tensors, folder / f"{half}.safetensors")
        torch.save((torch.zeros(256), torch.ones(256)), folder / "mean_std.pt")
    folder = root / "google-t5" / "t5-11b"
    if with_text and not folder.exists():
        from transformers import T5Config, T5EncoderModel

        folder.mkdir(parents=True)
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config(**T5))
        save(draw(encoder), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(T5))
        # bytes for words: the released vocabulary is not needed to measure
        words = {"tokenizer_class": "ByT5Tokenizer", "model_max_length": ROWS, "extra_ids": 125}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
    embeddings = root / "embeddings.safetensors"
    if not embeddings.exists():
        names = ("prompt", "negative_prompt")
        save({name: torch.randn(ROWS, T5["d_model"]).bfloat16() for name in names}, embeddings)


def run(
    root: Path, size: str, image: Path, flags: list[str], steps: int, folder: Path
) -> dict[str, Any]:
    """Run the command in a fresh process; return what its report says."""
    command = [sys.executable, "-m", "worldline", "diffusion", "video2world"]
    command += ["--checkpoint_dir", str(root), "--video_save_folder", str(folder)]
    command += ["--diffusion_transformer_dir", f"Cosmos-Predict1-{size}-Video2World"]
    command += ["--input_image_or_video_path", str(image), "--num_steps", str(steps)]
    command += ["--disable_guardrail", "--disable_prompt_upsampler", *flags]
    # a cache of its own: each run encodes its prompts
    environment = {**os.environ, "WORLDLINE_CACHE": str(folder / "cache")}
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    report = json.loads((folder / "output.json").read_text())
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
