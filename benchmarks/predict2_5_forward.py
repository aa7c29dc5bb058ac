"""How long one forward of the flow transformers takes at full size, and how exact it is.

    python benchmarks/predict2_5_forward.py --output benchmarks/results

Random weights; 93 frames of 704 x 1280, which are 84,480 tokens. Needs one GPU with 40 GB, or 100
for 14B; most of it for the plain modules that the kernels are compared with.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from full_size import GEMM_FLOPS, ROWS, fill, flops, gap
from torch import Tensor

from worldline.families.predict2_5.model import PRESETS, FlowDiT, FlowDiTConfig
from worldline.files import GIGABYTE
from worldline.nn import attention, modulation
from worldline.report import environment
from worldline.shapes import LatentShape

GRID = LatentShape(24, 88, 160)  # of 93 frames of 704 x 1280
PEERS = {  # seconds on one H200, torch 2.11, diffusers 0.42
    "2B": {"diffusers eager": 3.63, "diffusers compiled (47 s of compilation)": 3.13},
    "14B": {},
}


def make(config: FlowDiTConfig, device: torch.device) -> FlowDiT:
    with torch.device("meta"):
        model = FlowDiT(config)
    fill(model, device)
    return model


class Clip:
    """Inputs of one forward; the text is encoded once, as for a whole clip."""

    def __init__(self, model: FlowDiT, grid: LatentShape, device: torch.device) -> None:
        self.model = model
        shape = (1, model.config.latent_channels, grid.frames, grid.height, grid.width)
        self.latents = torch.randn(shape, device=device)
        self.features = torch.randn(1, ROWS, model.config.feature_width, device=device)
        self.mask = torch.zeros_like(self.latents[:, :1])
        self.mask[:, :, :1] = 1
        self.timesteps = torch.full((1, grid.frames), 700.0, device=device)
        self.timesteps[:, :1] = 0.1  # of known frames
        self.positions = model.make_positions(grid)
        self.context = model.encode_context(self.features)

    def forward(self, *, by_frame: bool = True) -> Tensor:
        timesteps = self.timesteps if by_frame else self.timesteps[:, -1:]
        return self.model(
            self.latents, timesteps, self.context, self.positions, condition_mask=self.mask
        )


def seconds_of(piece: Callable[[], object], rounds: int) -> list[float]:
    """The time of each call, without the first, which compiles kernels."""
    piece()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        piece()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


@torch.inference_mode()
def measure(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    config = PRESETS[size]
    model = make(config, device)
    resident = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    clip = Clip(model, GRID, device)
    first = clip.forward()
    torch.cuda.synchronize()
    warmup = time.perf_counter() - started
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(clip.forward, rounds)
    peak = torch.cuda.max_memory_reserved(device)
    shared = seconds_of(lambda: clip.forward(by_frame=False), rounds)
    context = seconds_of(lambda: model.encode_context(clip.features), rounds)
    with mock.patch.object(modulation, "kernels_for", return_value=None):
        plain = clip.forward()
    with mock.patch.object(attention, "_prefers_cudnn", return_value=False):
        other = clip.forward()
    clip.positions = model.make_positions(GRID, exact=True)
    turned = clip.forward()
    best, need = statistics.median(seconds), flops(config, GRID)
    return {
        "seconds": round(best, 4),
        "all_seconds": [round(second, 4) for second in seconds],
        "seconds_with_one_timestep_for_all_frames": round(statistics.median(shared), 4),
        "seconds_of_text_once_a_prompt": round(statistics.median(context), 5),
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
            "rounded against exact rotary exponents": gap(first, turned),
        },
    }


@torch.inference_mode()
def exactness(size: str, device: torch.device) -> dict[str, float]:
    """The relative error of bf16 forwards against float32, on a small grid, 8 blocks."""
    exact = make(replace(PRESETS[size], depth=8), device).float()
    clip = Clip(exact, LatentShape(4, 32, 32), device)
    with mock.patch.object(modulation, "kernels_for", return_value=None):
        truth = clip.forward()
    found = {"kernels, float32": gap(clip.forward(), truth)["relative_rms"]}
    clip.model = copy.deepcopy(exact).bfloat16()
    clip.context = clip.model.encode_context(clip.features)
    found["kernels, bf16"] = gap(clip.forward(), truth)["relative_rms"]
    with mock.patch.object(modulation, "kernels_for", return_value=None):
        found["plain modules, bf16"] = gap(clip.forward(), truth)["relative_rms"]
    return found


@torch.inference_mode()
def parts(size: str, device: torch.device) -> dict[str, float]:
    """Return milliseconds of the pieces of one block."""
    config, model = PRESETS[size], make(replace(PRESETS[size], depth=1), device)
    block, tokens = model.blocks[0], config.tokens(GRID).tokens
    x = torch.randn(1, tokens, config.width, device=device, dtype=torch.bfloat16)
    q = block.attention.body.heads(x)
    heads, few = q.transpose(1, 2), q[:, :ROWS].transpose(1, 2)
    noise = model.noise(torch.rand(1, GRID.frames, device=device))
    rotation = model.make_positions(GRID)
    weight = torch.ones(config.head_size, device=device, dtype=torch.bfloat16)
    shift, scale, gate = (one.bfloat16() for one in block.attention.modulation(noise))
    head_shift, head_scale = model.head.modulation(noise)
    pieces: dict[str, Callable[[], object]] = {
        "attention": lambda: attention.attend(heads, heads, heads),
        "cross attention": lambda: attention.attend(heads, few, few),
        "one projection": lambda: block.attention.body.q(x),
        "feed-forward": lambda: block.feed_forward.body(x),
        "modulation": lambda: block.attention.modulation(noise),
        "add and modulate": lambda: modulation.add_and_modulate(
            modulation.Residual(x, x, gate), None, shift, scale
        ),
        "norm of heads, turned": lambda: modulation.norm_heads(q, weight, rotation),
        "norm of the head, float32": lambda: modulation.add_and_modulate(
            modulation.Residual(x), None, head_shift, head_scale, torch.float32
        ),
    }
    return {
        name: round(1000 * statistics.median(seconds_of(piece, 5)), 3)
        for name, piece in pieces.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", default=["2B"], choices=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    result: dict[str, Any] = {
        "what": "one forward of the flow transformer, random bf16 weights",
        "shape": f"latents (1, 16, {GRID.frames}, {GRID.height}, {GRID.width}), text {ROWS} rows, "
        "a timestep for each latent frame",
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
    (arguments.output / "predict2_5_forward.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
