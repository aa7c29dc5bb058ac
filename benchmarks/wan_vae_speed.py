"""How long the Wan2.1 tokenizer takes at full size, piece by piece, and what its convolutions take.

    python benchmarks/wan_vae_speed.py --output benchmarks/results/wan_vae_speed.json

Random bf16 weights, 93 frames of 704 x 1280. Needs one GPU. Each convolution of a pass is also
timed alone: their sum is what cuDNN allows, whatever is done between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.export import draw_weights
from worldline.files import GIGABYTE
from worldline.nn.pieces import decode_stream, encode_stream
from worldline.report import environment
from worldline.shapes import VideoShape
from worldline.tokenizers.wan import model as wan
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig

GEMM_FLOPS = 790e12  # measured best of large bf16 products on an H200
PEER = {"encode": 2.94, "decode": 4.72}  # diffusers 0.42 on one H200, torch 2.11
WANTED = {"encode": 1.5, "decode": 2.4}
VARIANTS: dict[str, dict[str, Any]] = {
    "convolved in three axes": {"_FEW": 0},
    "torch's attention": {"_WIDEST": 1 << 30},
    "without the fused norm": {"kernels_for": lambda *_: None},
}
_SHOWN = 12  # convolutions of a pass, the slowest first


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of a call, without the first."""
    work()
    found = []
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@dataclass(frozen=True)
class Convolution:
    """A convolution by what decides its time; the layout is channels last."""

    axes: int
    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    biased: bool

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.axes == 2 else torch.channels_last_3d

    def call(self, device: torch.device, dtype: torch.dtype, form: torch.memory_format) -> Any:
        x = torch.randn(self.inputs, device=device, dtype=dtype).contiguous(memory_format=form)
        weight = torch.randn(self.weight, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=form)
        bias = torch.randn(self.weight[0], device=device, dtype=dtype) if self.biased else None
        convolve = F.conv2d if self.axes == 2 else F.conv3d
        return lambda: convolve(x, weight, bias, self.stride, self.padding)

    def flat(self) -> Convolution:
        """The same work in two axes: three frames side by side as channels."""
        if self.axes == 2:
            return self
        batch, channels, frames, *sides = self.inputs
        inputs = (batch * (frames - 2), 3 * channels, *sides)
        weight = (self.weight[0], 3 * channels, *self.weight[3:])
        return Convolution(2, inputs, weight, self.stride[1:], self.padding[1:], self.biased)

    def flops(self) -> float:
        with torch.device("meta"):
            convolve = F.conv2d if self.axes == 2 else F.conv3d
            x, weight = torch.empty(self.inputs), torch.empty(self.weight)
            out = convolve(x, weight, None, self.stride, self.padding)
        return 2.0 * out.numel() * weight[0].numel()


@contextmanager
def recorded(found: Counter[Convolution]) -> Iterator[None]:
    """Count the convolutions that run."""

    def watch(axes: int, real: Any) -> Any:
        def convolve(
            x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0
        ) -> Tensor:
            several = [n if isinstance(n, tuple) else (n,) * axes for n in (stride, padding)]
            shapes = tuple(x.shape), tuple(weight.shape)
            found[Convolution(axes, *shapes, *several, bias is not None)] += 1
            return real(x, weight, bias, stride, padding)

        return convolve

    with (
        mock.patch.object(F, "conv2d", watch(2, F.conv2d)),
        mock.patch.object(F, "conv3d", watch(3, F.conv3d)),
    ):
        yield


def time_convolutions(
    found: Counter[Convolution], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what the convolutions of a pass take alone, channels last and channels first."""
    total, first, flat, rows = 0.0, 0.0, 0.0, []
    for one, count in found.items():
        last = median_seconds(one.call(device, dtype, one.format), device, 3)
        plain = median_seconds(one.call(device, dtype, torch.contiguous_format), device, 3)
        side = median_seconds(one.flat().call(device, dtype, torch.channels_last), device, 3)
        total += count * last
        first += count * plain
        flat += count * side
        rows.append(
            {
                "input": list(one.inputs),
                "weight": list(one.weight),
                "calls": count,
                "seconds": round(count * last, 4),
                "seconds, channels first": round(count * plain, 4),
                "seconds, in two axes": round(count * side, 4),
                "tflop_per_second": round(one.flops() / last / 1e12, 1),
            }
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows.sort(key=lambda row: -row["seconds"])
    work = sum(count * one.flops() for one, count in found.items())
    return {
        "seconds": round(total, 4),
        "seconds, channels first": round(first, 4),
        "seconds, in two axes": round(flat, 4),
        "teraflop": round(work / 1e12, 1),
        "tflop_per_second": round(work / total / 1e12, 1),
        "slowest": rows[:_SHOWN],
    }


class Clip:
    """Both ways through the tokenizer, of one clip."""

    def __init__(self, model: WanTokenizer, video: VideoShape, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.dtype = next(model.parameters()).dtype
        grid = video.latent(model.config.temporal, model.config.spatial)
        generator = torch.Generator().manual_seed(0)
        shape = (1, 3, video.frames, video.height, video.width)
        self.video = torch.rand(shape, generator=generator).mul_(2).sub_(1).to(device, self.dtype)
        shape = (1, model.config.latent_channels, grid.frames, grid.height, grid.width)
        self.latents = torch.randn(shape, generator=generator).to(device, self.dtype)

    def encode(self, chunk: int) -> Tensor:
        self.model.chunk = chunk
        cuts = self.video.split(self.model.config.temporal * chunk, dim=2)
        return torch.cat(list(encode_stream(self.model, iter(cuts))), dim=2)

    def decode(self, chunk: int) -> Tensor:
        self.model.chunk = chunk
        return torch.cat(list(decode_stream(self.model, self.latents)), dim=2)

    def measure(self, way: str, chunk: int, rounds: int) -> tuple[dict[str, Any], Tensor]:
        work = getattr(self, way)
        result = work(chunk)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {
            "seconds": round(median_seconds(lambda: work(chunk), self.device, rounds), 4)
        }
        if self.device.type == "cuda":
            found["peak_gb"] = round(torch.cuda.max_memory_reserved() / GIGABYTE, 2)
        return found, result


def relative(ours: Tensor, wanted: Tensor) -> float:
    gap = (ours.double() - wanted.double()).square().mean().sqrt()
    return float(gap / wanted.double().square().mean().sqrt())


def errors(model: WanTokenizer, device: torch.device) -> dict[str, float]:
    """The error of bf16 against float32, of a small clip; relative, root mean square."""
    torch.backends.cudnn.allow_tf32 = False  # else float32 convolutions round to ten bits
    small = VideoShape(9, 12 * model.config.spatial, 16 * model.config.spatial)
    exact = WanTokenizer(model.config).to(device)
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    exact = exact.channels_last().requires_grad_(False).eval()
    ours, wanted = Clip(model, small, device), Clip(exact, small, device)
    wanted.video, wanted.latents = ours.video.float(), ours.latents.float()
    found = {way: relative(getattr(ours, way)(1), getattr(wanted, way)(1)) for way in PEER}
    with mock.patch.object(wan, "kernels_for", return_value=None):
        plain = {
            f"{way}, without kernel": relative(getattr(ours, way)(1), getattr(wanted, way)(1))
            for way in PEER
        }
    return found | plain


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--profile", type=Path, help="write a table of kernels here")
    parser.add_argument("--frames", type=int, default=93)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--channels", type=int, default=WanTokenizerConfig().channels)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    video = VideoShape(arguments.frames, arguments.height, arguments.width)
    torch.manual_seed(0)
    model = WanTokenizer(replace(WanTokenizerConfig(), channels=arguments.channels))
    draw_weights(model)
    model = model.to(device, torch.bfloat16).channels_last().requires_grad_(False).eval()
    clip = Clip(model, video, device)
    result: dict[str, Any] = {
        "what": f"Wan2.1 tokenizer, {arguments.channels} channels, random bf16 weights, "
        f"{video.frames} x {video.height} x {video.width}, in pieces",
        "commit": arguments.commit,
        **environment(device),
        "diffusers": PEER,
        "wanted": WANTED,
        "error against float32": errors(model, device),
    }
    print(result, flush=True)

    for way in PEER:
        alone: dict[str, Any] = {}
        reference: Tensor | None = None
        for chunk in (1, 2, 4):
            found, pieces = clip.measure(way, chunk, arguments.rounds)
            counted: Counter[Convolution] = Counter()
            with recorded(counted):
                getattr(clip, way)(chunk)
            if chunk == WanTokenizer.chunk:
                alone = time_convolutions(counted, device, torch.bfloat16)
            work = sum(count * one.flops() for one, count in counted.items())
            found["tflop_per_second"] = round(work / found["seconds"] / 1e12, 1)
            found["share_of_gemm"] = round(work / GEMM_FLOPS / found["seconds"], 3)
            if reference is None:
                reference = pieces
            else:
                found["against chunk 1"] = relative(pieces, reference)
            result[f"{way}, {chunk} latent frames at a time"] = found
            print(way, chunk, found, flush=True)
        result[f"{way}, convolutions alone"] = alone
        print(way, "alone", {k: v for k, v in alone.items() if k != "slowest"})
        for row in alone["slowest"]:
            print("   ", row, flush=True)
    for what, changed in VARIANTS.items():
        for way in PEER:
            with mock.patch.multiple(wan, **changed):
                found, _ = clip.measure(way, WanTokenizer.chunk, arguments.rounds)
            result[f"{way}, {what}"] = found
            print(way, what, found, flush=True)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            clip.decode(WanTokenizer.chunk)
            wait(device)
        table = profile.key_averages().table("self_cuda_time_total", row_limit=25)
        arguments.profile.write_text(table)
        print("\n".join(line[:60] + line[-80:] for line in table.splitlines()[:32]))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
