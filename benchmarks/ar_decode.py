"""Time the decoding of clips on a GPU, and compare the fast decoder with the plain one.

    python benchmarks/ar_decode.py --model 4B --output benchmarks/results/ar_decode_4b.json

Weights are random at full size, drawn on the GPU: neither speed nor rounding depends on them. For
each `--batch` so many clips are decoded in step, which are compared bit for bit with the first and
the last of them alone. `--model tiny --batch 2` tries the script, on a CPU too; there it has plain
modules alone.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from ar_end_to_end import TINY
from full_size import COPY_RATE, ROWS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from worldline.families.autoregressive.model import PRESETS, ARTransformer, make_positions
from worldline.families.autoregressive.step import CapturedDecoder, PlainDecoder, make_decoder
from worldline.sampling.tokens import Sampling, decode, draw_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRIED = 32  # tokens that are compared, of clips in step


def random_model(name: str) -> ARTransformer:
    config = TINY if name == "tiny" else PRESETS[name]
    with torch.device("meta"):
        model = ARTransformer(config)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE).requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
    return model


def prefix_of(model: ARTransformer) -> int:
    """The tokens of nine given frames, and those before them."""
    return 2 * model.config.grid.tokens_per_frame + model.config.leading_tokens


def random_text(model: ARTransformer) -> Tensor | None:
    width = model.config.context_width
    return None if width is None else torch.randn(1, ROWS, width, device=DEVICE)


def bytes_a_step(model: ARTransformer, tokens: int, batch: int = 1) -> float:
    """Return weights read once, and each clip's keys and values of the mean visible length."""
    config = model.config
    unread = ("embedding.weight", "cross_attention.k.weight", "cross_attention.v.weight")
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(unread))
    mean_visible = prefix_of(model) + tokens / 2
    if config.context_width is not None:
        mean_visible += ROWS
    cache = 2 * config.depth * config.num_kv_heads * config.head_size * mean_visible
    return 2 * (weights + batch * cache)


@torch.inference_mode()
def agreement(model: ARTransformer, steps: int) -> dict[str, float]:
    """Feed both decoders the same tokens; return the largest relative error of their logits."""
    positions = make_positions(model.config, "cuda", torch.bfloat16)
    prefix, context = prefix_of(model), random_text(model)
    prompt = torch.randint(model.config.vocabulary, (1, prefix), device="cuda")
    greedy = Sampling(temperature=0)
    fast = CapturedDecoder(model, greedy, [context])
    plain = PlainDecoder(model, greedy, [context])
    fast.start(prompt, None)
    plain.start(prompt, None)
    worst, equal = 0.0, 0
    for _ in range(steps):
        at = plain.done - 1
        last = plain.ids[:, at : at + 1]
        encoded = plain.encoded[0]
        theirs = model(last, positions, cache=plain.cache, start=at, context=encoded)[0, -1].float()
        fast.ids[:, at] = last[0]
        fast.step(None)
        ours = fast.logits[0].float()
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        equal += int(ours.argmax() == theirs.argmax())
        plain.ids[:, plain.done] = theirs.argmax()
        plain.done += 1
    rows = slice(prefix, prefix + steps)
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


def in_step(model: ARTransformer, batch: int, tokens: int) -> dict[str, Any]:
    """Decode `batch` clips; return how long a step takes, and whether they are as alone."""
    prompts = torch.randint(model.config.vocabulary, (batch, prefix_of(model)), device=DEVICE)
    contexts = [random_text(model) for _ in range(batch)]

    def start(rows: slice, count: int) -> tuple[PlainDecoder, Iterator[int]]:
        chosen = prompts[rows]
        decoder = make_decoder(model, Sampling(), contexts[rows])
        noise = draw_noise(range(batch)[rows], model.config.vocabulary, count, prompts.device)
        return decoder, decode(decoder, chosen, count, noise)

    decoder, steps = start(slice(None), tokens)
    next(steps)
    wait()
    begun = time.perf_counter()
    seen = next(steps)  # the graph is captured here
    wait()
    started = time.perf_counter()
    for _ in steps:
        pass
    wait()
    seconds = time.perf_counter() - started
    drawn = decoder.tokens[:, prefix_of(model) :][:, :TRIED].clone()
    name = decoder.name
    del decoder, steps
    equal = {}
    for clip in sorted({0, batch - 1}):
        alone, steps = start(slice(clip, clip + 1), min(TRIED, tokens))
        for _ in steps:
            pass
        own = alone.tokens[0, prefix_of(model) :]
        equal[f"clip {clip}"] = bool(torch.equal(own, drawn[clip, : len(own)]))
        del alone, steps
    moved = bytes_a_step(model, tokens, batch)
    step = seconds / (tokens - seen) * 1e3
    result = {
        "decoder": name,
        "ms_a_step": round(step, 4),
        "tokens_a_second": round(batch / step * 1e3, 1),
        "seconds_of_first_chunk": round(started - begun, 3),
        "bytes_a_step": moved,
        "bound_ms": round(moved / COPY_RATE * 1e3, 4),
        "share_of_bound": round(moved / COPY_RATE * 1e3 / step, 4),
        f"first {TRIED} tokens as alone": equal,
    }
    if DEVICE == "cuda":
        result["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return result


def repeated(model: ARTransformer, times: int) -> dict[str, Any]:
    """Decode one clip again and again; return in which runs what first differs from the first run.

    That is the cache of the prompt, the token drawn behind it, or, of a later token, the logits (of
    the kernels) or the draw.
    """
    prompt = torch.randint(model.config.vocabulary, (1, prefix_of(model)), device=DEVICE)
    context = random_text(model)
    first: list[tuple[str, Tensor]] = []
    differing: dict[str, list[int]] = {}
    for run in range(times):
        decoder = make_decoder(model, Sampling(), [context])
        found: list[tuple[str, Tensor]] = []
        noise = draw_noise([0], model.config.vocabulary, TRIED, prompt.device)
        for number, _ in enumerate(_each(decoder, prompt, noise)):
            if not number:
                found.append(("keys of the prompt", decoder.cache.keys.clone()))
                found.append(("values of the prompt", decoder.cache.values.clone()))
            elif isinstance(decoder, CapturedDecoder):
                found.append((f"logits of token {number}", decoder.logits.clone()))
            found.append((f"token {number}", decoder.tokens[:, -1].clone()))
        first = first or found
        for (what, ours), (_, theirs) in zip(found, first, strict=True):
            if not torch.equal(ours, theirs):
                differing.setdefault(what, []).append(run)
                break
        del decoder, found
    return {"runs": times, "first difference": differing}


def _each(decoder: PlainDecoder, prompt: Tensor, noise: Iterator[Tensor]) -> Iterator[None]:
    """Draw tokens one by one."""
    for number, drawn in enumerate(noise):
        if number:
            decoder.step(drawn)
        else:
            decoder.start(prompt, drawn)
        yield


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@click.command()
@click.option("--model", "name", default="4B", type=click.Choice([*PRESETS, "tiny"]))
@click.option("--tokens", help="By default those of a clip.", type=int)
@click.option("--batch", "batches", multiple=True, default=(1, 8), type=int, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--plain-tokens", default=64, help="How many tokens to time on the plain path.")
@click.option("--repeats", default=0, help=f"How often to draw the first {TRIED} tokens again.")
def main(
    name: str,
    tokens: int | None,
    batches: tuple[int, ...],
    output: Path | None,
    plain_tokens: int,
    repeats: int,
) -> None:
    """Measure, print, and write a JSON file."""
    model = random_model(name)
    config = model.config
    tokens = tokens or config.length - prefix_of(model)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "torch": torch.__version__,
        "model": name,
        "dtype": "bfloat16",
        "prefix": prefix_of(model),
        "tokens": tokens,
        "in_step": {},
    }
    for batch in batches:
        result["in_step"][str(batch)] = in_step(model, batch, tokens)
        print(json.dumps(result["in_step"]), flush=True)
    if repeats:
        result["repeated"] = repeated(model, repeats)
        print(json.dumps(result["repeated"]), flush=True)
    if DEVICE == "cuda":
        result["agreement"] = agreement(model, 16)
        prompt = torch.randint(config.vocabulary, (1, prefix_of(model)), device=DEVICE)
        plain = PlainDecoder(model, Sampling(), [random_text(model)])
        noise = draw_noise([0], config.vocabulary, plain_tokens, prompt.device)
        steps = decode(plain, prompt, plain_tokens, noise)
        next(steps)
        wait()
        started = time.perf_counter()
        for _ in steps:
            pass
        wait()
        seconds = time.perf_counter() - started
        result["plain_ms_a_token"] = round(seconds / (plain_tokens - 1) * 1e3, 4)
        fast = CapturedDecoder(model, Sampling(), [random_text(model)])
        fast.start(prompt, torch.ones(1, config.vocabulary, device=DEVICE))
        fast.done = prefix_of(model) + tokens // 2
        result["kernels_us"] = kernels(fast, 20)
    print(json.dumps(result, indent=1))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
