"""How long one forward of the diffusion transformers takes at full size, and how exact it is.

    python benchmarks/diffusion_forward.py --output benchmarks/results

Random weights; 121 frames of 704 x 1280, which are 56,320 tokens. Needs one GPU with 40 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from full_size import GEMM_FLOPS, GRID, ROWS, fill, flops, gap
from torch import Tensor

from worldline.families.diffusion.model import PRESETS, DiT, DiTConfig
from worldline.files import GIGABYTE
from worldline.nn import attention, modulation
from worldline.report import environment
from worldline.shapes import LatentShape

PEERS = {  # seconds on one H200, torch 2.11, diffusers 0.42
    "7B": {"diffusers eager": 4.38, "diffusers compiled (50 s of compilation)": 3.73},
    "14B": {"diffusers eager": 7.28},
}


def make(config: DiTConfig, device: torch.device) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
    fill(model, device)
    return model


@torch.inference_mode()
def measure(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    config = PRESETS[f"{size}-Video2World"]
    model = make(config, device)
    resident = torch.cuda.memory_allocated(device)
    latents = torch.randn(1, 16, GRID.frames, GRID.height, GRID.width, device=device)
    mask = torch.zeros_like(latents[:, :1])
    mask[:, :, :1] = 1
    text = torch.randn(1, ROWS, config.context_width, device=device)

    def forward(sigma: float = 1.0, rotary: torch.dtype = torch.bfloat16) -> Tensor:
        positions = model.make_positions(GRID, 24, rotary_dtype=rotary)
        context = model.encode_context(text)
        timesteps = torch.full((1,), sigma, device=device).log() / 4
        return model(latents, timesteps, context, positions, condition_mask=mask)

    started = time.perf_counter()
    first = forward()
    torch.cuda.synchronize()
    warmup = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_reserved(device)
    with mock.patch.object(modulation, "kernels_for", return_value=None):
        plain = forward()
    with mock.patch.object(attention, "_prefers_cudnn", return_value=False):
        other = forward()
    turned = forward(rotary=torch.float32)
    best = statistics.median(seconds)
    need = flops(config)
    return {
        "seconds": round(best, 4),
        "all_seconds": [round(second, 4) for second in seconds],
        "first_call_seconds": round(warmup, 3),
        "tflop_per_second": round(need / best / 1e12, 1),
        "share_of_bound": round(need / GEMM_FLOPS / best, 3),
        "bound_seconds": round(need / GEMM_FLOPS, 3),
        "peers_seconds": PEERS[size],
        "peak_reserved_gb": round(peak / GIGABYTE, 2),
        "weights_gb": round(resident / GIGABYTE, 2),
        "attention": attention.backend_name(device, torch.bfloat16, config.tokens(GRID).tokens),
        "difference": {
            "kernels against plain modules": gap(first, plain),
            "cuDNN against other attention": gap(first, other),
            "bf16 against float32 rotary angles": gap(first, turned),
        },
    }


@torch.inference_mode()
def exactness(size: str, device: torch.device) -> dict[str, float]:
    """The relative error of bf16 forwards against float32, on a small grid, 8 blocks."""
    config = replace(PRESETS[f"{size}-Video2World"], depth=8)
    exact, grid = make(config, device).float(), LatentShape(4, 32, 32)
    model = copy.deepcopy(exact).bfloat16()
    latents = torch.randn(1, 16, grid.frames, grid.height, grid.width, device=device)
    text = torch.randn(1, ROWS, config.context_width, device=device)
    mask = torch.zeros_like(latents[:, :1])

    def forward(network: DiT) -> Tensor:
        positions = network.make_positions(grid, 24)
        level = torch.zeros(1, device=device)
        context = network.encode_context(text)
        return network(latents, level, context, positions, condition_mask=mask)

    with mock.patch.object(modulation, "kernels_for", return_value=None):
        truth, plain = forward(exact), forward(model)
    return {
        "kernels, bf16": gap(forward(model), truth)["relative_rms"],
        "plain modules, bf16": gap(plain, truth)["relative_rms"],
        "kernels, float32": gap(forward(exact), truth)["relative_rms"],
    }


@torch.inference_mode()
def parts(size: str, device: torch.device) -> dict[str, float]:
    """Return milliseconds of the pieces of one block."""
    config = PRESETS[f"{size}-Video2World"]
    with torch.device("meta"):
        model = DiT(config)
    block = model.blocks[0].to(torch.bfloat16).to_empty(device=device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    tokens = config.tokens(GRID).tokens
    x = torch.randn(1, tokens, config.width, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, tokens, config.num_heads, 128, device=device, dtype=torch.bfloat16)
    heads = q.transpose(1, 2)
    few = q[:, :ROWS].transpose(1, 2)
    vector = torch.randn(1, config.width, device=device, dtype=torch.bfloat16)
    weight = torch.ones(128, device=device, dtype=torch.bfloat16)
    pieces = {
        "attention": lambda: attention.attend(heads, heads, heads),
        "cross attention": lambda: attention.attend(heads, few, few),
        "one projection": lambda: block.attention.body.q(x),
        "feed-forward": lambda: block.feed_forward.body(x),
        "add and modulate": lambda: modulation.add_and_modulate(
            modulation.Residual(x, x, vector), x[0], vector, vector
        ),
        "norm of heads": lambda: modulation.norm_heads(q, weight),
    }
    found = {}
    for name, piece in pieces.items():
        piece()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            piece()
        torch.cuda.synchronize()
        found[name] = round((time.perf_counter() - started) * 200, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", default=["7B", "14B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    result: dict[str, Any] = {
        "what": "one forward of the diffusion transformer, random bf16 weights",
        "shape": f"latents (1, 16, {GRID.frames}, {GRID.height}, {GRID.width}), text 512 x 1024",
        "commit": arguments.commit,
        **environment(device),
    }
    for size in arguments.sizes:
        result[size] = measure(size, device, arguments.rounds)
        torch.cuda.empty_cache()
        result[size]["milliseconds_of_parts"] = parts(size, device)
        torch.cuda.empty_cache()
        result[size]["error_against_float32"] = exactness(size, device)
        torch.cuda.empty_cache()
        print(json.dumps(result[size], indent=1), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "diffusion_forward.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
