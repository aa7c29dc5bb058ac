"""Time three kernels-bound parts in this tree and in that of an earlier commit, in turn.

    git worktree add /tmp/base 7f4d740
    python benchmarks/against_commit.py --base /tmp/base/src --output benchmarks/results/house.json

The parts are decoding of the autoregressive 4B model, a forward of the 7B diffusion transformer at
56,320 tokens, and encoding and decoding of the Wan2.1 tokenizer at 93 x 704 x 1280. Weights are
random at full size. Each round starts a fresh process for each tree; outputs are compared by hash.
`--size tiny` tries the script on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from two_trees import common_arguments, run_in, write_report

BOUNDS = {  # seconds on one H200, copy rate, GEMM rate, convolutions alone
    "decode": 1.88e-3,
    "forward": 2.796,
    "wan encode": 0.93,
    "wan decode": 1.54,
}


def named(name: str, *modules: str) -> Any:
    """An object that moved: from the first module that has it."""
    for module in modules:
        try:
            return getattr(import_module(f"worldline.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {modules}")


def random_network(kind: Any, config: Any, device: torch.device) -> Any:
    with torch.device("meta"):
        network: nn.Module = kind(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = network.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for _, parameter in sorted(network.named_parameters()):  # modules may have moved
        if parameter.ndim == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
    return network


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call after the first."""
    work()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def decode(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds a token of the 4B model, batch 1."""
    model_at = (
        "families.autoregressive.model",
        "families.autoregressive.weights",
        "models.predict1_ar.model",
    )
    step_at = ("families.autoregressive.step", "models.predict1_ar.decoder")
    tokens_at = ("sampling.tokens", "sampling.decode", "sampling.logits")
    kind, presets = named("ARTransformer", *model_at), named("PRESETS", *model_at)
    make_positions = named("make_positions", *model_at)
    sampling = named("Sampling", *tokens_at)()
    run, draw_noise = named("decode", *tokens_at), named("draw_noise", *tokens_at)
    from dataclasses import replace

    config = presets["4B"]
    if tiny:
        config = replace(config, depth=2, width=64, num_heads=4, num_kv_heads=2, head_size=16)
        config = replace(config, hidden=128)
    model = random_network(kind, config, device)
    count = 40 if tiny else 1500
    prefix = 2 * config.grid.tokens_per_frame + config.leading_tokens
    torch.manual_seed(1)
    prompt = torch.randint(config.vocabulary, (1, 64 if tiny else prefix), device=device)

    make, words = named("make_decoder", *step_at), [model, sampling]
    if "positions" in signature(make).parameters:  # before decoders made their own
        words.insert(1, make_positions(config, device, model.head.weight.dtype))
    # before each clip had its own
    contexts = {"contexts": [None]} if "contexts" in signature(make).parameters else {"batch": 1}

    def clip() -> Tensor:
        decoder = make(*words, **contexts)
        steps = run(decoder, prompt, count, draw_noise([0], config.vocabulary, count, device))
        next(steps)  # the prompt
        next(steps)  # capture
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in steps:
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append((time.perf_counter() - started) / (count - 2))
        return decoder.tokens

    spent: list[float] = []
    tokens = [clip() for _ in range(2 if tiny else 4)]
    return {"decode": spent[1:], "digest decode": digest(tokens[-1])}


@torch.inference_mode()
def forward(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of a forward of the 7B transformer."""
    from dataclasses import replace

    from worldline.shapes import LatentShape

    at = (
        "families.diffusion.model",
        "families.diffusion.weights",
        "models.predict1_dit.model",
    )
    config, grid = named("PRESETS", *at)["7B-Video2World"], LatentShape(16, 88, 160)
    if tiny:
        config, grid = replace(config, depth=2, width=256, num_heads=2), LatentShape(2, 8, 8)
    model = random_network(named("DiT", *at), config, device)
    torch.manual_seed(1)
    latents = torch.randn(1, 16, grid.frames, grid.height, grid.width, device=device)
    mask = torch.zeros_like(latents[:, :1])
    text = torch.randn(1, 512, config.context_width, device=device).to(model.embed.weight.dtype)
    results: list[Tensor] = []

    def work() -> None:
        positions = model.make_positions(grid, 24, rotary_dtype=torch.bfloat16)
        times = torch.zeros(1, device=device)
        context = model.encode_context(text)
        results[:] = [model(latents, times, context, positions, condition_mask=mask)]

    return {
        "forward": seconds_of(work, device, 1 if tiny else 3),
        "digest forward": digest(results[0]),
    }


@torch.inference_mode()
def wan(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Seconds of encoding and decoding a clip by the Wan2.1 tokenizer."""
    at = ("tokenizers.wan.model",)
    config = named("WanTokenizerConfig", *at)()
    streams = ("nn.pieces", "tokenizers.wan.stream")
    encode, decode = named("encode_stream", *streams), named("decode_stream", *streams)
    model = random_network(named("WanTokenizer", *at), config, device)
    if hasattr(model, "channels_last"):
        model.channels_last()
    else:
        named("channels_last", "tokenizers.wan.load")(model)
    torch.manual_seed(1)
    frames, height, width = (5, 32, 32) if tiny else (93, 704, 1280)
    dtype = next(model.parameters()).dtype
    video = torch.rand(1, 3, frames, height, width, device=device).to(dtype) * 2 - 1
    results: dict[str, Tensor] = {}

    def encoding() -> None:
        results["wan encode"] = torch.cat(list(encode(model, [video])), dim=2)

    def decoding() -> None:
        results["wan decode"] = torch.cat(list(decode(model, results["wan encode"])), dim=2)

    repeats = 1 if tiny else 3
    return {
        "wan encode": seconds_of(encoding, device, repeats),
        "wan decode": seconds_of(decoding, device, repeats),
        **{f"digest {name}": digest(result) for name, result in results.items()},
    }


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--part", choices=["decode", "forward", "wan"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.part:
        print(json.dumps(globals()[arguments.part](device, arguments.size == "tiny")))
        return
    rows: dict[str, dict[str, list[Any]]] = {}
    for part in ("decode", "forward", "wan"):
        for _ in range(arguments.rounds):
            for tree in ("base", "head"):
                words = (__file__, "--part", part, "--size", arguments.size)
                found = run_in(getattr(arguments, tree), *words)
                for name, value in found.items():
                    values = value if isinstance(value, list) else [value]
                    rows.setdefault(name, {}).setdefault(tree, []).extend(values)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": arguments.commit,
        "base": "7f4d740",
    }
    for name, trees in rows.items():
        if name.startswith("digest"):
            report[f"equal {name.removeprefix('digest ')}"] = (
                len({*trees["base"], *trees["head"]}) == 1
            )
            continue
        base, head = (statistics.median(trees[tree]) for tree in ("base", "head"))
        report[name] = {
            "base_seconds": round(base, 6),
            "seconds": round(head, 6),
            "ratio": round(head / base, 4),
            "bound_seconds": BOUNDS[name],
            "all": {tree: [round(value, 6) for value in values] for tree, values in trees.items()},
        }
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
