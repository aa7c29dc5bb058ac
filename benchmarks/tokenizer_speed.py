"""How long the continuous video tokenizer takes at full size, whole and piece by piece.

    python benchmarks/tokenizer_speed.py --output benchmarks/results/tokenizer_speed.json

CV8x8x8 with random bf16 weights, 121 frames of 704 x 1280. Needs one GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny.export import draw_weights
from worldline.files import GIGABYTE
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.report import environment
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer

FRAMES, HEIGHT, WIDTH = 121, 704, 1280
TERAFLOP = {"encode": 35.7, "decode": 61.3}  # counted on the reference's modules
GEMM_FLOPS = 790e12  # measured best of large bf16 products on an H200
PEER = {"encode": 0.48, "decode": 0.85, "peak_gb": 33}  # diffusers on one H200, torch 2.11


def measure(work: Callable[[], Tensor], rounds: int = 3) -> tuple[dict[str, float], Tensor]:
    result = work()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_reserved() / GIGABYTE
    return {"seconds": round(statistics.median(seconds), 4), "peak_gb": round(peak, 2)}, result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CosmosTokenizer(PRESETS["CV8x8x8"])
    draw_weights(model)
    model = model.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    video = torch.rand(1, 3, FRAMES, HEIGHT, WIDTH, device="cuda").mul_(2).sub_(1).bfloat16()
    latents = torch.randn(1, 16, 16, HEIGHT // 8, WIDTH // 8, device="cuda").bfloat16()
    result: dict[str, Any] = {
        "what": "CV8x8x8, random bf16 weights, 121 x 704 x 1280",
        "commit": arguments.commit,
        **environment(torch.device("cuda", 0)),
        "diffusers": PEER,
    }
    whole = {}
    for name, work in (
        ("encode", lambda: model.encode(video)),
        ("decode", lambda: model.decode(latents)),
    ):
        result[name], whole[name] = measure(work)
        result[name]["tflop_per_second"] = round(TERAFLOP[name] / result[name]["seconds"], 1)
        bound = TERAFLOP[name] * 1e12 / GEMM_FLOPS
        result[name]["share_of_bound"] = round(bound / result[name]["seconds"], 3)
        print(name, result[name], flush=True)
    for chunk in (1, 2, 4):
        model.chunk = chunk
        found, pieces = measure(
            lambda: torch.cat([p.cpu() for p in decode_stream(model, latents)], 2)
        )
        gap = (pieces.cuda().float() - whole["decode"].float()).square().mean().sqrt()
        result[f"decode, {chunk} latent frames at a time"] = found | {"rms_error": float(gap)}
        print(chunk, found, float(gap), flush=True)
    cuts = [video[:, :, :1], *video[:, :, 1:].split(24, dim=2)]
    found, pieces = measure(lambda: torch.cat(list(encode_stream(model, iter(cuts))), dim=2))
    gap = (pieces.float() - whole["encode"].float()).square().mean().sqrt()
    result["encode, 24 frames at a time"] = found | {"rms_error": float(gap)}
    print(found, float(gap), flush=True)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            model.decode(latents)
            torch.cuda.synchronize()
        table = profile.key_averages().table("self_cuda_time_total", row_limit=25)
        arguments.profile.write_text(table)
        print("\n".join(line[:60] + line[-80:] for line in table.splitlines()[:32]))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
