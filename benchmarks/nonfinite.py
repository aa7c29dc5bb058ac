"""Time of the checks for NaN and infinity beside that of what they check; proof that none waits.

    python benchmarks/nonfinite.py --output benchmarks/results/nonfinite.json

Latents, logits and frames have their full size; seconds of forwards are those of
`docs/performance.md`, on one H200. The loops run while PyTorch refuses whatever waits for the
device (`set_sync_debug_mode`). `--model` decodes with random weights of that size, with the check
and without, in turn. `--model tiny --tokens 100 --divisor 16` tries the script on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from ar_decode import DEVICE, prefix_of, random_model, random_text
from torch import Tensor

from worldline.families.autoregressive.step import make_decoder
from worldline.families.denoise import report
from worldline.finite import total
from worldline.report import Recorder, environment
from worldline.sampling.solvers import Stepped, Steps
from worldline.sampling.tokens import Sampling, decode, draw_noise

GPU = DEVICE == "cuda"
STEP = "worldline.families.autoregressive.step"
# name -> shape, dtype, seconds that it takes to make it
CHECKED: dict[str, tuple[tuple[int, ...], torch.dtype, float]] = {
    "Predict2.5 2B, latents of a step": ((16, 24, 88, 160), torch.float32, 2 * 3.12),
    "7B, latents of a step": ((16, 16, 88, 160), torch.float32, 2 * 3.61),
    "7B of Cosmos 1.0, latents of a step": ((16, 16, 88, 160), torch.float64, 2 * 3.61),
    "4B, logits of a token": ((64_000,), torch.bfloat16, 2.37e-3),
    "4B, logits of 8 clips": ((8, 64_000), torch.bfloat16, 4.18e-3),
    "12B, logits of a token": ((64_000,), torch.bfloat16, 6.56e-3),
    "CV8x8x8, 121 frames": ((3, 121, 704, 1280), torch.bfloat16, 0.22),
    "Wan2.1 tokenizer, 93 frames": ((3, 93, 704, 1280), torch.bfloat16, 2.0),
}


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


@contextmanager
def without_waiting() -> Iterator[None]:
    """Let PyTorch raise where the host waits for a tensor."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def milliseconds(piece: Callable[[], object], times: int = 200) -> float:
    """Mean of many calls, as one CUDA graph where there is a GPU: of the device alone."""
    piece()
    wait()
    run: Callable[[], object] = lambda: [piece() for _ in range(times)]  # noqa: E731
    if GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
        run()
    wait()
    started = time.perf_counter()
    run()
    wait()
    return (time.perf_counter() - started) / times * 1e3


def of_tensors(divisor: int) -> dict[str, Any]:
    """Cost of `total` for tensors of the sizes in `CHECKED`, the first axis cut by a divisor."""
    found = {}
    for name, (shape, dtype, seconds) in CHECKED.items():
        x = torch.randn((*shape[:-1], shape[-1] // divisor), device=DEVICE).to(dtype)
        rows = (-1,) if shape[-1] == 64_000 else ()  # one sum a clip
        sums = torch.zeros_like(total(x, *rows))
        spent = milliseconds(lambda x=x, rows=rows, sums=sums: sums.add_(total(x, *rows)))
        share = round(spent / seconds / 1e3 * 100, 4)
        found[name] = {"milliseconds": round(spent, 5), "percent_of_the_forward": share}
    return found


def of_steps(divisor: int) -> dict[str, Any]:
    """Steps of a sampler, without a network, as `report` checks them while waiting is refused.

    It waits for the device once a step for its clock, as it did before there was a check.
    """
    shape = (1, 16, 24, 88, 160 // divisor)
    device = torch.device(DEVICE)

    def sampler() -> Steps:
        x = torch.randn(shape, device=device)
        for _ in range(35):
            x = x * 0.99
            yield Stepped(x, x)
        return x

    def seconds() -> float:
        recorder = Recorder(device)
        started = time.perf_counter()
        with without_waiting():
            steps = list(report(sampler(), recorder, torch.bfloat16, 35, 0))
        assert len(steps) == 36
        return (time.perf_counter() - started) / 35

    seconds()
    free = mock.patch("worldline.families.denoise.total", return_value=torch.zeros(()))
    checked, plain = [], []
    for _ in range(5):
        checked.append(seconds())
        with free:
            plain.append(seconds())
    difference = statistics.median(checked) - statistics.median(plain)
    return {"milliseconds_a_step": round(difference * 1e3, 4), "refused_waits": 0}


@torch.inference_mode()
def of_tokens(name: str, tokens: int) -> dict[str, Any]:
    """Milliseconds a token with the check in the graph and without, in turn."""
    model = random_model(name)
    prompt = torch.randint(model.config.vocabulary, (1, prefix_of(model)), device=DEVICE)
    context = random_text(model)

    def milliseconds_of(check: bool) -> tuple[float, Tensor]:
        constant = torch.zeros((), device=DEVICE)
        plain = mock.patch(f"{STEP}.total", return_value=constant)
        decoder = make_decoder(model, Sampling(), [context])
        noise = draw_noise([0], model.config.vocabulary, tokens, prompt.device)
        with mock.patch(f"{STEP}.total", total) if check else plain:
            steps = decode(decoder, prompt, tokens, noise)
            next(steps), next(steps)  # the graph is captured here
            wait()
            started = time.perf_counter()
            with without_waiting():
                done = [*steps]
            wait()
        assert done[-1] == tokens
        return (time.perf_counter() - started) / (tokens - 32) * 1e3, decoder.tokens

    found: dict[bool, list[float]] = {True: [], False: []}
    drawn = []
    for _ in range(4):
        for check in (True, False):
            spent, ids = milliseconds_of(check)
            found[check].append(spent)
            drawn.append(ids)
    assert all(torch.equal(ids, drawn[0]) for ids in drawn)
    checked, plain = (statistics.median(found[check][1:]) for check in (True, False))
    return {
        "milliseconds_a_token": {"with": round(checked, 4), "without": round(plain, 4)},
        "percent": round((checked / plain - 1) * 100, 3),
        "equal_tokens": True,
        "refused_waits": 0,
    }


@click.command()
@click.option("--model", default="4B", help="Of `ar_decode.py`; tiny on a CPU.")
@click.option("--tokens", default=1500)
@click.option("--divisor", default=1, help="Of the tensors' last axis.")
@click.option("--output", type=click.Path(path_type=Path))
def main(model: str, tokens: int, divisor: int, output: Path | None) -> None:
    """Print the figures as JSON, and write them to --output."""
    results = {
        **environment(torch.device(DEVICE)),
        "tensors": of_tensors(divisor),
        "steps": of_steps(divisor),
        f"tokens of {model}": of_tokens(model, tokens),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
