"""Time the captured step of a model that GPUs share, and its kernels, with random weights.

    torchrun --standalone --nproc_per_node=2 benchmarks/tensor_parallel_step.py --model 4B \
        --model 12B --output benchmarks/results/tensor_parallel_step.json

The step is replayed after a prompt of 5,120 tokens: as it is, and by NCCL in place of memory that
all GPUs reach. With `--nproc_per_node=1` it is the step of one GPU.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from full_size import COPY_RATE, fill
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from worldline.families.autoregressive.model import PRESETS, SHARD_PLAN, ARTransformer
from worldline.families.autoregressive.step import CapturedDecoder
from worldline.parallel import job, tensor
from worldline.parallel.mesh import Axis
from worldline.report import environment
from worldline.sampling.tokens import Sampling

PROMPT, WARM, STEPS, PROFILED = 5120, 5, 200, 3


def build(size: str, axis: Axis) -> ARTransformer:
    """A part of a model with random bf16 weights."""
    with torch.device("meta"):
        model = ARTransformer(PRESETS[size].part(axis.count))
    fill(model, axis.device)
    SHARD_PLAN.join(model, axis)
    return model


def step_bytes(model: ARTransformer) -> int:
    """Of the weights and of the cache in the middle of the steps that are timed."""
    config = model.config
    weights = sum(value.nbytes for value in model.parameters()) - model.embedding.weight.nbytes
    keys = PROMPT + WARM + STEPS // 2
    return weights + 4 * config.depth * config.num_kv_heads * config.head_size * keys


def replay(model: ARTransformer, axis: Axis, kernels: bool = False) -> dict[str, Any]:
    """Milliseconds of a step; also microseconds of each kernel in it, if asked."""
    contexts: list[Tensor | None] = [None]
    if model.config.context_width is not None:
        contexts = [torch.zeros(1, 512, model.config.context_width, device=axis.device).bfloat16()]
    decoder = CapturedDecoder(model, Sampling(top_p=0.8), contexts, axis)
    noise = torch.ones(1, axis.count * model.config.vocabulary, device=axis.device)
    decoder.start(torch.zeros(1, PROMPT, dtype=torch.int64, device=axis.device), noise)
    for _ in range(WARM):
        decoder.step(noise)
    torch.cuda.synchronize()
    axis.any(False)
    started = time.perf_counter()
    for _ in range(STEPS):
        decoder.step(noise)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"ms": round((time.perf_counter() - started) / STEPS * 1e3, 4)}
    if kernels:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(PROFILED):
                decoder.step(noise)
            torch.cuda.synchronize()
        events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
        found["microseconds"] = {
            event.key[:60]: [
                round(event.device_time_total / PROFILED, 1),
                round(event.count / PROFILED, 1),
            ]
            for event in events[:16]
        }
    return found


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(PRESETS)), required=True)
@click.option("--commit", default="")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(models: tuple[str, ...], commit: str, output: Path) -> None:
    """Time the step of each model, and write a JSON file."""
    axis = job.join(torch.device(job.own_device("cuda") or "cuda"))
    result: dict[str, Any] = {"commit": commit, "gpus": axis.count, **environment(axis.device)}
    for name in models:
        model = build(name, axis)
        found = result[name] = {"bound_ms": round(step_bytes(model) / COPY_RATE * 1e3, 4)}
        found["as it is"] = replay(model, axis, kernels=True)
        if axis.count > 1:
            with patch.multiple(tensor, kept={}, _symmetric=lambda *_: []):
                found["NCCL"] = replay(model, axis)["ms"]
        del model
        torch.cuda.empty_cache()
        if axis.first:
            print(name, json.dumps(found, indent=1), flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    job.leave()


if __name__ == "__main__":
    main()
