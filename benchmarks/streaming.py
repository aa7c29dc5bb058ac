"""What it costs to stream blocks from pinned host memory, and what it saves.

    python benchmarks/streaming.py --commit $(git rev-parse --short HEAD)

Random weights at full size, drawn on the GPU, in one process: forwards with all weights on the GPU,
then the same forwards as the network's blocks come one after another, as with `--offload_…`.
Outputs are compared bit for bit. Needs one GPU with 50 GB and 40 GB of host memory; under four
minutes on an H200. `--tiny` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from full_size import GRID, ROWS, T5, fill
from predict2_5_forward import GRID as FLOW_GRID
from predict2_5_forward import Clip
from torch import Tensor, nn

from worldline.catalog import ENTRIES
from worldline.families.diffusion.model import PRESETS, DiT
from worldline.families.predict2_5.model import PRESETS as FLOW_PRESETS
from worldline.families.predict2_5.model import FlowDiT
from worldline.family import Compute, Opened, load_family
from worldline.files import GIGABYTE
from worldline.locate import Place
from worldline.nn.modulation import fused
from worldline.opening import plan
from worldline.parallel.offload import BlockPlan, Offloadable
from worldline.report import environment
from worldline.shapes import LatentShape
from worldline.weights.stream import empty_like

CPU = torch.device("cpu")
SMALL = LatentShape(2, 8, 12)
TINY: dict[str, Any] = {
    "width": 48,
    "depth": 3,
    "num_heads": 2,
    "head_size": 24,
    "hidden": 128,
    "lora_rank": 8,
    "context_width": 48,
}
TINY_T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 3}
TINY_REASON1 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
}


@dataclass(frozen=True)
class Case:
    """A network that is measured.

    Attributes:
        shape: what a forward is of, in words.
        make: builds it on the meta device.
        forward: (network, device) -> a forward of the same inputs.
        blocks: how it is streamed.
        released: model whose plan has a stage of it, and the stage.
    """

    shape: str
    make: Callable[[], nn.Module]
    forward: Callable[[Any, torch.device], Callable[[], Tensor]]
    blocks: BlockPlan
    released: tuple[str, str]


def diffusion(grid: LatentShape, model: DiT, device: torch.device) -> Callable[[], Tensor]:
    latents = torch.randn(1, 16, grid.frames, grid.height, grid.width, device=device)
    mask = torch.zeros_like(latents[:, :1])
    mask[:, :, :1] = 1
    context = model.encode_context(torch.randn(1, ROWS, model.config.context_width, device=device))
    positions = model.make_positions(grid, 24, rotary_dtype=torch.bfloat16)
    times = torch.zeros(1, device=device)
    return lambda: model(latents, times, context, positions, condition_mask=mask)


def flow(grid: LatentShape, model: FlowDiT, device: torch.device) -> Callable[[], Tensor]:
    return Clip(model, grid, device).forward


def prompt(encoder: Any, device: torch.device) -> Callable[[], Tensor]:
    """A prompt that fills all rows; T5 has a mask, too."""
    ids = (torch.arange(ROWS) % 900)[None].to(device)
    masks = [torch.ones_like(ids)] * ("mask" in signature(encoder.embed).parameters)
    return lambda: encoder.embed(ids, *masks)


def cases(*, tiny: bool) -> dict[str, Case]:
    changed: dict[str, Any] = TINY if tiny else {}
    grid, flow_grid = (SMALL, SMALL) if tiny else (GRID, FLOW_GRID)
    found = {}
    for size in ("7B", "14B"):
        name, config = f"Cosmos-Predict1-{size}-Video2World", PRESETS[f"{size}-Video2World"]
        found[f"Predict1 {size}"] = Case(
            "121 frames of 704 x 1280, 56,320 tokens",
            partial(DiT, replace(config, **changed)),
            partial(diffusion, grid),
            DiT.BLOCKS,
            (name, "denoise"),
        )
    for size in ("2B", "14B"):
        features = {"feature_width": 96} if tiny else {}
        found[f"Predict2.5 {size}"] = Case(
            "93 frames of 704 x 1280, 84,480 tokens",
            partial(FlowDiT, replace(FLOW_PRESETS[size], **changed, **features)),
            partial(flow, flow_grid),
            FlowDiT.BLOCKS,
            (f"Cosmos-Predict2.5-{size}", "denoise"),
        )
    return found


def text_cases(*, tiny: bool) -> dict[str, Case]:
    from predict2_5_end_to_end import REASON1  # with what writes files, by other packages

    from worldline.text.reason1 import Reason1Encoder, Reason1Files
    from worldline.text.t5 import T5Encoder, T5Files

    t5, reason1 = T5 | (TINY_T5 if tiny else {}), REASON1 | (TINY_REASON1 if tiny else {})
    encoders: tuple[tuple[str, Any, Any, str], ...] = (
        ("T5-11B", partial(T5Encoder, t5), T5Files, "Cosmos-Predict1-7B-Video2World"),
        ("Reason1-7B", partial(Reason1Encoder, reason1), Reason1Files, "Cosmos-Predict2.5-2B"),
    )
    found = {}
    for name, kind, files, model in encoders:
        blocks = replace(files.blocks, blocks=f"network.{files.blocks.blocks}")
        make = partial(kind, None, ROWS)
        found[name] = Case(f"a prompt of {ROWS} tokens", make, prompt, blocks, (model, "text"))
    return found


def draw(case: Case, device: torch.device) -> nn.Module:
    """A network of random bf16 weights; tables that are computed stay as they are."""
    with torch.device("meta"):
        module = case.make()
    tables = {name: table for name, table in module.named_buffers() if not table.is_meta}
    fill(module, device)
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, table.to(device))
    return module


def send_home(module: nn.Module, device: torch.device, blocks: BlockPlan) -> Offloadable[Any]:
    """The network waiting in host memory, which is pinned before it is written."""
    values = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    for tensor, value in values:
        tensor.data = empty_like(value, CPU)
    part = Offloadable(module, device, offload=True, blocks=blocks)
    part.offload = True  # on a CPU, too
    for tensor, value in values:
        tensor.data.copy_(value)
    return part


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(forward: Callable[[], Tensor], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of forwards, their peak memory, and the hash of the last output."""
    seconds = []
    for _ in range(rounds):
        settle(device)
        started = time.perf_counter()
        output = forward()
        settle(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {
        "seconds": round(statistics.median(seconds), 4),
        "all_seconds": [round(each, 4) for each in seconds],
        "peak_reserved_gb": round(peak / GIGABYTE, 2),
        "sha256": hashlib.sha256(output.float().cpu().numpy().tobytes()).hexdigest(),
    }


def start_again(device: torch.device) -> None:
    """Let the next peak count nothing that was there before."""
    torch.manual_seed(1)  # of the inputs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def planned_gb(case: Case, device: torch.device) -> float:
    """What the memory plan of the released model has for the stage, with everything offloaded."""
    name, stage = case.released
    entry = next(entry for entry in ENTRIES if entry.name == name)
    family = load_family(entry.command.partition(" ")[0])
    options, nowhere = family.options.parse({}), Place(Path(name), ())
    opened = Opened(family, name, nowhere, options, parts=family.presets(entry))
    compute = Compute(device, torch.bfloat16, torch.bfloat16, fused(device))
    found = plan(opened, [family.request.parse({})], compute)
    [need] = (found.need(one, found.flags) for one in found.stages if one.name == stage)
    return round(need / GIGABYTE, 2)


@torch.inference_mode()
def compare(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    module = draw(case, device)
    start_again(device)
    forward = case.forward(module, device)
    forward()  # compiles kernels
    resident = measure(forward, rounds, device)
    del forward
    started = time.perf_counter()
    part = send_home(module, device, case.blocks)
    sending = time.perf_counter() - started
    start_again(device)
    started = time.perf_counter()
    with part.on_device() as there:
        settle(device)
        entering = time.perf_counter() - started
        streamed = measure(case.forward(there, device), rounds, device)
    return {
        "shape": case.shape,
        "weights_gb": round(part.nbytes / GIGABYTE, 2),
        "weights_on_the_device_gb": round(part.visiting_nbytes / GIGABYTE, 2),
        "pinned": part.pinned,
        "seconds_to_pin_and_write": round(sending, 2),
        "seconds_to_the_first_forward": round(entering, 3),
        "resident": resident,
        "streamed": streamed,
        "slower_percent": round(100 * (streamed["seconds"] / resident["seconds"] - 1), 2),
        "same_output": streamed["sha256"] == resident["sha256"],
        "planned_with_everything_offloaded_gb": planned_gb(case, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--case", action="append", help="Of these alone, such as 'Predict1 7B'.")
    parser.add_argument("--no-text", action="store_true", help="Leave the text encoders out.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--commit", default="")
    parser.add_argument("--tiny", action="store_true", help="Small networks on the CPU.")
    arguments = parser.parse_args()
    device = CPU if arguments.tiny else torch.device("cuda", 0)
    result: dict[str, Any] = {
        "what": "forwards of random bf16 weights, resident and streamed from pinned host memory",
        "commit": arguments.commit,
        **environment(device),
        "cases": {},
    }
    chosen = cases(tiny=arguments.tiny)
    if not arguments.no_text:
        chosen |= text_cases(tiny=arguments.tiny)
    for name, case in chosen.items():
        if arguments.case and name not in arguments.case:
            continue
        result["cases"][name] = compare(case, arguments.rounds, device)
        print(json.dumps({name: result["cases"][name]}, indent=1), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if not all(case["same_output"] for case in result["cases"].values()):
        raise SystemExit("streamed outputs differ from resident ones")


if __name__ == "__main__":
    main()
