"""Time the decoding of one clip on a GPU, and compare the fast decoder with the plain one.

    python benchmarks/ar_decode.py --model 4B --output benchmarks/results/ar_decode_4b.json

Weights are random at full size, drawn on the GPU: neither speed nor rounding depends on them.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

from worldline.models.predict1_ar.decoder import CapturedDecoder, PlainDecoder
from worldline.models.predict1_ar.model import PRESETS, ARTransformer, make_positions
from worldline.sampling.decode import decode, draw_noise
from worldline.sampling.logits import Sampling

PREFIX = 5120  # tokens of the nine given frames
COPY_RATE = 4.3e12  # bytes a second that an H200 moves


def random_model(name: str) -> ARTransformer:
    with torch.device("meta"):
        model = ARTransformer(PRESETS[name])
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
    return model


def bytes_a_token(model: ARTransformer, tokens: int) -> float:
    """Return weights read once, and keys and values of the mean visible length."""
    config = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("embedding"))
    mean_visible = PREFIX + tokens / 2
    cache = 2 * config.depth * config.num_kv_heads * config.head_size * mean_visible
    return 2 * (weights + cache)


@torch.inference_mode()
def agreement(model: ARTransformer, steps: int) -> dict[str, float]:
    """Feed both decoders the same tokens; return the largest relative error of their logits."""
    positions = make_positions(model.config, "cuda", torch.bfloat16)
    prompt = torch.randint(model.config.vocabulary, (1, PREFIX), device="cuda")
    greedy = Sampling(temperature=0)
    fast = CapturedDecoder(model, positions, greedy)
    plain = PlainDecoder(model, positions, greedy)
    fast.start(prompt, None)
    plain.start(prompt, None)
    worst, equal = 0.0, 0
    for _ in range(steps):
        at = plain.done - 1
        last = plain.ids[:, at : at + 1]
        theirs = model(last, positions, cache=plain.cache, start=at)[0, -1].float()
        fast.ids[:, at] = last[0]
        fast.step(None)
        ours = fast.fused.logits[0].float()
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        equal += int(ours.argmax() == theirs.argmax())
        plain.ids[:, plain.done] = theirs.argmax()
        plain.done += 1
    rows = slice(PREFIX, PREFIX + steps)
    k_fast, k_plain = fast.cache.keys[:, :, :, rows], plain.cache.keys[:, :, :, rows]
    return {
        "largest_relative_error_of_logits": worst,
        "equal_greedy_tokens": equal / steps,
        "relative_error_of_keys": float((k_fast - k_plain).float().norm() / k_plain.float().norm()),
    }


def kernels(decoder: CapturedDecoder, steps: int) -> dict[str, float]:
    """Return microseconds a token of every kernel."""
    noise = torch.ones(1, decoder.model.config.vocabulary, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            decoder.step(noise)
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        spent[event.name[:60]] += event.device_time / steps
    return {k: round(v, 2) for k, v in sorted(spent.items(), key=lambda kv: -kv[1])[:14]}


@click.command()
@click.option("--model", "name", default="4B", type=click.Choice(["4B", "12B"]))
@click.option("--tokens", default=7680)
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--plain-tokens", default=64, help="How many tokens to time on the plain path.")
def main(name: str, tokens: int, output: Path | None, plain_tokens: int) -> None:
    """Measure, print, and write a JSON file."""
    model = random_model(name)
    positions = make_positions(model.config, "cuda", torch.bfloat16)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": name,
        "dtype": "bfloat16",
        "prefix": PREFIX,
        "tokens": tokens,
        "agreement": agreement(model, 16),
    }
    prompt = torch.randint(model.config.vocabulary, (1, PREFIX), device="cuda")
    for label, kind, count in (
        ("captured", CapturedDecoder, tokens),
        ("plain", PlainDecoder, plain_tokens),
    ):
        decoder = kind(model, positions, Sampling())
        steps = decode(
            decoder, prompt, count, draw_noise([0], model.config.vocabulary, count, prompt.device)
        )
        next(steps)
        torch.cuda.synchronize()
        decoder_ready = time.perf_counter()
        seen = next(steps)  # the graph is captured here
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in steps:
            pass
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        result[label] = {
            "ms_a_token": round(seconds / (count - seen) * 1e3, 4),
            "seconds_of_first_chunk": round(started - decoder_ready, 3),
        }
        if isinstance(decoder, CapturedDecoder):
            decoder.done = PREFIX + 100
            decoder.position.fill_(PREFIX + 3840)
            result["kernels_us"] = kernels(decoder, 20)
        del decoder
    moved = bytes_a_token(model, tokens)
    bound = moved / COPY_RATE * 1e3
    result["bytes_a_token"] = moved
    result["bound_ms"] = round(bound, 4)
    result["share_of_bound"] = round(bound / result["captured"]["ms_a_token"], 4)
    result["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    print(json.dumps(result, indent=1))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
